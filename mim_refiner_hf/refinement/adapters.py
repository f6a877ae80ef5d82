"""Low-rank adapters: `--trainable lora:R` trains these in place of the encoder's own weights.

    adapt(encoder, rank=8, first_block=0, seed=0)     # in place; only the adapters are trained
    merged_encoder(encoder)                           # an ordinary encoder that gives the same
    adapter_of(encoder).save(Path("out/adapter"))

Beside every linear layer W of attention and MLP stand two factors (LoRA, arXiv 2106.09685): the
layer gives `W x + ALPHA B A x`, with A (R, inputs) and B (outputs, R). B begins at 0, so a run
begins with its start. They are peft's own layers, put into the encoder, which stays the model that
it is; so what is saved is a PEFT adapter. The moving average is one of A and of B. peft is needed
by those who ask for adapters and by nobody else: `pip install "mim_refiner_hf[lora]"`.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import check_folder, staged_folder
from ..runtime.wording import setting

ALPHA = 1
"""What stands before the product of the factors, whatever their rank."""

_FILE = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# what peft calls the only adapter, and an encoder that it wraps
_NAME = "default"
_WRAPPED = "base_model.model."

_README = """\
---
library_name: peft
---

# Low-rank adapters of a refinement

```python
from mim_refiner_hf import load_encoder
from peft import PeftModel

base = load_encoder({base!r})
base.config.pooling = {pooling!r}
model = PeftModel.from_pretrained(base, {name!r})
```

`model.merge_and_unload()` is the refined encoder, bit by bit.
"""


@dataclass(frozen=True)
class Adapter:
    """What `PeftModel.from_pretrained(base, folder)` adds to the encoder that a run began with.

    Attributes:
        tensors: the factors by peft's names, on the CPU.
        config: peft's own (LoraConfig).
        pooling: of the vectors that were refined.
        base: what `load_encoder` takes for the encoder that they belong to.
    """

    tensors: Mapping[str, Tensor]
    config: Any
    pooling: str
    base: str = ""

    def save(self, folder: Path) -> None:
        """Write it as peft reads it, and how that is done, all or nothing."""
        config = copy.copy(self.config)
        config.base_model_name_or_path = self.base
        config.inference_mode = True
        with staged_folder(folder, check_adapter_folder) as new:
            save_file(dict(self.tensors), new / _FILE, {"format": "pt"})
            config.save_pretrained(new)
            readme = _README.format(base=self.base, pooling=self.pooling, name=folder.name)
            (new / "README.md").write_text(readme)


def check_adapter_folder(folder: Path) -> Path:
    """`folder`, resolved, if an adapter can be written there; else a ValueError."""
    return check_folder(folder, _CONFIG, "adapter")


def _targets(config: MimRefinerConfig, first_block: int) -> str:
    """A pattern of the names of the layers that get an adapter."""
    blocks = "|".join(map(str, range(first_block, config.num_hidden_layers)))
    layers = r"attention\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(fc1|gate|fc2)"
    return rf"layers\.({blocks})\.({layers})"


def adapted_layers(encoder: MimRefinerModel, first_block: int) -> dict[str, nn.Linear]:
    """The linear layers of attention and MLP from `first_block` on, by name."""
    targets = re.compile(_targets(encoder.config, first_block))
    layers = {}
    for name, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear) and targets.fullmatch(name):
            layers[name] = layer
    return layers


def check_rank(rank: int, config: MimRefinerConfig, first_block: int) -> None:
    """Whether adapters of this rank can be put into such an encoder, here and now.

    Raises:
        ValueError: for too large a rank, for nothing to adapt, and where peft is missing.
    """
    named = setting("trainable", f"lora:{rank}")
    width = config.hidden_size
    if rank > width:
        raise ValueError(
            f"{named}: the rank must be at most {width}, the encoder's width; "
            "8 to 16 are usual, and all weights are trained by "
            f"{setting('trainable', 'all')}"
        )
    with torch.device("meta"):
        encoder = MimRefinerModel(config)
    if not adapted_layers(encoder, first_block):
        raise ValueError(
            f"{named}: the encoder has no linear layers of attention and MLP to adapt; "
            f"use {setting('trainable', 'all')}"
        )
    if find_spec("peft") is None:
        raise ValueError(f'{named}: peft is missing; pip install "mim_refiner_hf[lora]"')


def adapt(encoder: MimRefinerModel, rank: int, first_block: int, seed: int) -> None:
    """Put adapters into the blocks from `first_block` on, in place; nothing else is trained then.

    Where they begin is a pure function of the seed. Nothing for a rank of 0.
    """
    if rank == 0:
        return
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=ALPHA * rank, target_modules=_targets(encoder.config, first_block)
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that it has changed
        warnings.simplefilter("ignore", FutureWarning)
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(config, encoder, adapter_name=_NAME)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def is_adapted(encoder: MimRefinerModel) -> bool:
    """Whether there are adapters in an encoder."""
    return "peft_config" in vars(encoder)


@torch.no_grad()
def merged_encoder(encoder: MimRefinerModel) -> MimRefinerModel:
    """An ordinary encoder with the adapters in its weights, a copy; itself where it has none."""
    if not is_adapted(encoder):
        return encoder
    plain = copy.deepcopy(encoder)
    adapted: dict[str, Any] = {
        name: layer for name, layer in plain.named_modules() if hasattr(layer, "get_base_layer")
    }
    for name, layer in adapted.items():
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    del vars(plain)["peft_config"]
    return plain


def adapter_of(encoder: MimRefinerModel) -> Adapter | None:
    """The adapters of an encoder, as peft has them; None where it has none."""
    if not is_adapted(encoder):
        return None
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        if "lora_" in name:
            saved = _WRAPPED + name.replace(f".{_NAME}.", ".")
            tensors[saved] = tensor.detach().cpu().contiguous()
    config = vars(encoder)["peft_config"][_NAME]
    return Adapter(tensors, config, str(encoder.config.pooling))

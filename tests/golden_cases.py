"""The goldens of the authors' code in the shared folder: what a test knows of a case.

    facts("mae")["num_heads"]                       # the case's config.json
    inputs, outputs = tensors("nna-loss")
    state = encoder_state(contents("mae", "checkpoint_full.pth"))

Another set of the same cases, with other sizes, runs through the same tests:
`MIM_REFINER_SHARED=/other/shared pytest`. So no test states a size, a number of heads or of
tensors: it takes them from `facts`, or counts them.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

BESIDE_THE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared"
SHARED = Path(os.environ.get("MIM_REFINER_SHARED", BESIDE_THE_REPOSITORY))
GOLDENS = SHARED / "fixtures"

MAE_DECODER = {"decoder": r"decoder_.*|mask_token"}
BESIDE_THE_ENCODER: dict[str, dict[str, str]] = {
    "mae": MAE_DECODER,
    "dbot": MAE_DECODER,
    "crossmae": {"decoder": r"decoder_.*|mask_token|dec_norms\..*|wfm\..*"},
    "data2vec2": {
        "decoder": r"modality_encoders\.IMAGE\.decoder\..*",
        "moving average of the training": r"_ema\..*",
    },
    "ibot": {"projection head": r"head\..*"},
    "conmim": {
        "pre-training head": r"lm_head\..*|projectors\..*|mask_token",
        "position index": r".*relative_position_index",
    },
    "capi": {
        "predictor after its first block": r"backbone\.decoder\.blocks\.[1-9]\d*\..*",
        "clustering head": r"head\..*",
    },
}
"""What files hold beside an encoder, by family: the word of the report -> names in the file."""


def hub_in_memory() -> Any:
    """The shared folder's stand-in Hub, to be entered: `url`, `repos`, `env()` for a process."""
    file = SHARED / "tools" / "hub_stub.py"
    spec = importlib.util.spec_from_file_location("hub_stub", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HubStub()


@functools.cache
def facts(case: str, file: str = "config.json") -> Any:
    """What the file of a case states; nothing where there is no shared folder."""
    path = GOLDENS / case / file
    return json.loads(path.read_text()) if SHARED.is_dir() else {}


def tensors(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of a case."""
    folder = GOLDENS / case
    return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


def contents(case: str, file: str) -> dict[str, Any]:
    """A torch file of a case, whose training settings may be a plain `argparse.Namespace`."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(GOLDENS / case / file, weights_only=True))


def encoder_state(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file's model by their names in the file, nested ones with a dot."""
    keys = [key for key in ("state_dict", "model", "teacher", "target_encoder") if key in contents]
    state: dict[str, Tensor] = {}
    for name, value in (contents[keys[0]] if keys else contents).items():
        nested = value if isinstance(value, dict) else None
        if nested is None:
            state[name] = value
        else:
            state.update({f"{name}.{inner}": tensor for inner, tensor in nested.items()})
    return state


def dropped_names(state: dict[str, Tensor], family: str) -> dict[str, set[str]]:
    """What of `state` is no part of the encoder, by the word of the report; no empty sets."""
    dropped = {
        reason: {name for name in state if re.fullmatch(pattern, name)}
        for reason, pattern in BESIDE_THE_ENCODER.get(family, {}).items()
    }
    return {reason: names for reason, names in dropped.items() if names}


def encoder_tensors(state: dict[str, Tensor], family: str) -> int:
    """How many tensors of ours the encoder in `state` fills: a fused qkv counts three times."""
    lost = set().union(*dropped_names(state, family).values())
    kept = [name for name in state if name not in lost]
    return len(kept) + 2 * sum(".attn.qkv." in name for name in kept)


def states_heads(contents: dict[str, Any]) -> bool:
    """Whether a file says how many heads it has: in its settings, or by its table of biases."""
    tables = [name for name in encoder_state(contents) if "relative_position_bias_table" in name]
    return "ctor_kwargs" in contents or "cfg" in contents or bool(tables)


def heads_to_pass(case: str, file: str) -> int | None:
    """The number of heads where the file does not state it, else None."""
    return None if states_heads(contents(case, file)) else facts(case)["num_heads"]

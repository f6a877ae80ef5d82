"""An encoder whose linear layers multiply 8-bit whole numbers, on a CPU.

    quick = in_int8(encoder)                             # a copy; the encoder stays as it is
    least_cosine(encoder, quick, images, ["block11.cls"], loading)    # 0.99985, on a first batch
    computed_in(quick)                                   # "int8", as in a store's manifest

A weight is a whole number from -127 to 127 times the step of its output, |row|.max() / 127, found
once; an input likewise times the step of its token, found anew in each pass. The sum of products is
exact, in 32 bits, and all between the layers is fp32. Steps per token, and not per batch, keep the
few large channels of one token from coarsening all others, and a vector from depending on the
images beside it.

torch's kernel (`_int_mm`, on which torchao builds too) uses VNNI or AMX; `python -m benchmarks
features-int8` measures speed and least cosine. torch's own dynamic quantisation has one step for a
whole batch, so a vector would depend on the images beside it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.loading import Loading
from ..model.modeling_mim_refiner import MimRefinerModel
from .features import encode, frozen
from .image_shards import SetOrStream, ShardSampler, shard_loader

# rows multiplied at a time: what stands between the steps of the computation stays in the cache
_ROWS = 512
_LARGEST = 127


class Int8Linear(nn.Module):
    """What an `nn.Linear` computes, with weight and input rounded to 8 bits; not to be trained."""

    weight: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        exact = linear.weight.detach().float()
        step = step_of(exact)
        # (in, out), as the product reads it
        self.register_buffer("weight", (exact / step).round().to(torch.int8).T.contiguous())
        self.register_buffer("step", step[:, 0])
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        output = rows.new_empty(len(rows), len(self.step))
        for part, result in zip(rows.split(_ROWS), output.split(_ROWS), strict=True):
            step = step_of(part)
            whole = (part / step).round_().to(torch.int8)
            torch.mul(torch._int_mm(whole, self.weight), self.step, out=result)
            result.mul_(step)
            if self.bias is not None:
                result.add_(self.bias)
        return output.view(*tokens.shape[:-1], -1)


def step_of(rows: Tensor) -> Tensor:
    """What one whole number stands for in each row of (N, D), as (N, 1)."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    return largest.clamp_min(torch.finfo(rows.dtype).tiny * _LARGEST) / _LARGEST


def in_int8(encoder: MimRefinerModel) -> MimRefinerModel:
    """A copy that computes its linear layers in int8, and all else in fp32."""
    linear = [module for module in encoder.modules() if type(module) is nn.Linear]
    # a copy takes these in their place, and so never holds the weights twice
    instead: dict[int, Any] = {id(module): Int8Linear(module) for module in linear}
    return copy.deepcopy(encoder, instead).float()


def computed_in(encoder: MimRefinerModel) -> str:
    """In which numbers an encoder computes: "float32", "bfloat16", "int8"."""
    if any(isinstance(module, Int8Linear) for module in encoder.modules()):
        return "int8"
    return str(encoder.dtype).removeprefix("torch.")


def least_cosine(
    exact: MimRefinerModel,
    quick: MimRefinerModel,
    images: SetOrStream,
    columns: Sequence[str],
    loading: Loading,
) -> tuple[float, int]:
    """The least cosine between vectors of the same image and column by two encoders.

    Of the first batch with an image that can be read; also how many images that were. Where none
    can be read the cosine is 1, of 0 images.
    """
    sampler = ShardSampler(images, loading.batch_size, loading.batch_size, lambda shard: True)
    processor = vars(exact)["image_processor"]
    for batch in shard_loader(sampler, processor, 0, torch.device("cpu")):
        if batch.pixel_values is None:
            continue
        vectors = []
        for encoder in (exact, quick):
            with frozen(encoder, loading.device) as device:
                vectors.append(encode(encoder, batch.pixel_values.to(device), columns))
        cosines = [F.cosine_similarity(vectors[0][name], vectors[1][name]) for name in columns]
        return float(torch.stack(cosines).min()), len(batch.rows)
    return 1.0, 0

"""Learning rates, weight decay, schedule, moving average of the weights (paper, Table 10), and what a checkpoint keeps of AdamW.

    groups = encoder_groups(encoder, layer_decay=0.65, weight_decay=0.05) + head_groups(heads, weight_decay=1e-5)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    set_learning_rate(optimizer, learning_rate(step, warmup, total, peak))

Every parameter group carries `lr_scale`; the schedule's value times it is the group's learning rate.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .files import CheckpointError
from .sharding import local, place

END_LEARNING_RATE = 1e-6


def learning_rate(step: int, warmup: int, total: int, peak: float) -> float:
    """The rate of update `step` (0-based): linear warm-up that leaves out 0 and the peak, then a cosine towards 1e-6."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return peak + 0.5 * (1 - math.cos(math.pi * progress)) * (END_LEARNING_RATE - peak)


def layer_scale(name: str, num_layers: int, decay: float) -> float:
    """Layer-wise learning-rate decay d: embeddings d^(L+1), block i (0-based) d^(L-i), final norm 1 (the released code).

    CAPI's predictor comes after the last block, as the final norm does: 1.
    """
    if name.startswith("embeddings."):
        return decay ** (num_layers + 1)
    if block := re.match(r"layers\.(\d+)\.", name):
        return decay ** (num_layers - int(block[1]))
    return 1.0


def is_position(name: str) -> bool:
    """Position tables, absolute and relative, and the frequencies of rope; they are not trained during refinement."""
    return (
        name.endswith("position_embeddings")
        or "relative_position_bias." in name
        or ".rope." in name
    )


def freeze(encoder: nn.Module, blocks: int) -> None:
    """Mark what is not trained: position tables always; with `blocks` > 0 the embeddings and the first blocks too."""
    for name, parameter in encoder.named_parameters():
        block = re.match(r"layers\.(\d+)\.", name)
        early = name.startswith("embeddings.") or (block is not None and int(block[1]) < blocks)
        parameter.requires_grad_(not (is_position(name) or (blocks > 0 and early)))


def _groups(
    named: Iterable[tuple[str, nn.Parameter, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """One group per (scale, decay); no decay on biases, on tensors of <= 1 dimension and on the CLS and register tokens."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter, scale in named:
        exempt = name.endswith((".bias", "_token", "_tokens")) or parameter.ndim <= 1
        decay = 0.0 if exempt else weight_decay
        group = groups.setdefault(
            (scale, decay), {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def encoder_groups(
    encoder: nn.Module, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of what is trained in the encoder, with layer-wise decayed `lr_scale`."""
    layers = encoder.config.num_hidden_layers  # type: ignore[union-attr]
    return _groups(
        (
            (name, parameter, layer_scale(name, layers, layer_decay))  # type: ignore[arg-type]
            for name, parameter in encoder.named_parameters()
            if parameter.requires_grad
        ),
        weight_decay,
    )


def head_groups(
    heads: nn.Module, weight_decay: float, lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups of the heads; their stacked batch-norm parameters (heads, channels) count as one-dimensional."""
    named = [(name, parameter, lr_scale) for name, parameter in heads.named_parameters()]
    norms = [row for row in named if ".norm." in row[0]]
    return _groups([row for row in named if ".norm." not in row[0]], weight_decay) + _groups(
        norms, 0.0
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group `value * lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """EMA of the trained weights, `average = decay * average + (1 - decay) * model`; the average starts as a copy."""
    pairs = [
        (a, p)
        for a, p in zip(average.parameters(), model.parameters(), strict=True)
        if p.requires_grad
    ]
    if pairs:
        torch._foreach_lerp_([local(a) for a, _ in pairs], [local(p) for _, p in pairs], 1 - decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat named tensors, `optimizer.<parameter>.<key>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{i}.{key}": torch.as_tensor(value)
        for i, values in state.items()
        for key, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Put back what `optimizer_tensors` gave, sharded as the parameters are.

    Raises:
        CheckpointError: naming file and tensor, for the state of a parameter that does not exist, has another shape, or is not whole.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names: dict[int, dict[str, str]] = {}
    for name in checkpoint.tensors:
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            names.setdefault(int(index), {})[key] = name
    keys, state = {key for each in names.values() for key in each}, {}
    for number, own in names.items():
        values = {key: checkpoint.tensors[name] for key, name in own.items()}
        fits = number < len(parameters) and values.keys() == keys
        if not fits or any(
            value.ndim and value.shape != parameters[number].shape for value in values.values()
        ):
            raise CheckpointError(
                f"{checkpoint.where}: optimizer.{number} is not the state of parameter {number} of {len(parameters)}; it is of "
                "another model or version: name another --output_dir, or remove this checkpoint"
            )
        state[number] = {
            key: place(value, parameters[number]) if value.ndim else value
            for key, value in values.items()
        }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


__all__ = [
    "encoder_groups",
    "freeze",
    "head_groups",
    "is_position",
    "layer_scale",
    "learning_rate",
    "optimizer_tensors",
    "restore_optimizer",
    "set_learning_rate",
    "update_average",
]

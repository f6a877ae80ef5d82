"""Learning rates, weight decay, moving average, and what a checkpoint keeps of the optimiser.

    groups = encoder_groups(encoder, layer_decay=0.65, weight_decay=0.05)
    groups += head_groups(heads, weight_decay=1e-5)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    set_learning_rate(optimizer, learning_rate(step, warmup, total, peak))

Every parameter group carries `lr_scale`; the schedule's value times it is the group's learning
rate. The defaults are the numbers of the paper's Table 10.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .checkpoint import Checkpoint
from .files import CheckpointError
from .sharding import local, shard_like
from .wording import setting


def learning_rate(step: int, warmup: int, total: int, peak: float, end: float = 1e-6) -> float:
    """The rate of update `step` (0-based): linear warm-up, then a cosine towards `end`.

    The warm-up leaves out 0 and the peak, the cosine its end.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return peak + 0.5 * (1 - math.cos(math.pi * progress)) * (end - peak)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group `value * lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]


def recompute_blocks(model: PreTrainedModel) -> None:
    """Recompute every block in the backward pass: less memory, more time, the same gradient."""
    # transformers 5.23 has a new name for it
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


# --- what is trained, and in which groups


def is_position(name: str) -> bool:
    """Whether a parameter is a position table or a frequency of rope; refinement trains neither."""
    return (
        name.endswith("position_embeddings")
        or "relative_position_bias." in name
        or ".rope." in name
    )


def freeze(encoder: nn.Module, blocks: int, *, positions: bool = False) -> None:
    """Mark what is not trained: with `blocks`, embeddings and first blocks; position tables.

    With `positions`, the tables are trained as what they belong to; frequencies of rope never are.
    """
    for name, parameter in encoder.named_parameters():
        block = re.match(r"layers\.(\d+)\.", name)
        early = name.startswith("embeddings.") or (block is not None and int(block[1]) < blocks)
        fixed = ".rope." in name if positions else is_position(name)
        frozen = fixed or (blocks > 0 and early)
        parameter.requires_grad_(not frozen)


def layer_scale(name: str, num_layers: int, decay: float) -> float:
    """The learning rate of a parameter relative to the last one's: layer-wise decay d, of L blocks.

    d^(L + 1) for the embeddings, d^(L - i) for block i (0-based), 1 for the final norm (the
    released code). CAPI's predictor comes after the last block, as the final norm does: 1.
    """
    if name.startswith("embeddings."):
        return decay ** (num_layers + 1)
    block = re.match(r"layers\.(\d+)\.", name)
    if block is not None:
        return decay ** (num_layers - int(block[1]))
    return 1.0


def encoder_groups(
    encoder: nn.Module, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of what is trained in the encoder, with layer-wise decayed `lr_scale`."""
    num_layers: Any = encoder.config.num_hidden_layers  # type: ignore[union-attr]
    trained = []
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            trained.append((name, parameter, layer_scale(name, num_layers, layer_decay)))
    return _groups(trained, weight_decay)


def head_groups(
    heads: nn.Module, weight_decay: float, lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups of the heads; none of their batch norms' parameters decays.

    Those are stacked (heads, channels), so that their number of dimensions does not tell.
    """
    norms: list[tuple[str, nn.Parameter, float]] = []
    others: list[tuple[str, nn.Parameter, float]] = []
    for name, parameter in heads.named_parameters():
        rows = norms if ".norm." in name else others
        rows.append((name, parameter, lr_scale))
    return _groups(others, weight_decay) + _groups(norms, 0.0)


def _groups(
    named: Iterable[tuple[str, nn.Parameter, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """One group per (scale, decay) of (name, parameter, scale).

    Biases, tensors of at most one dimension, CLS and register tokens, and position tables where
    they are trained do not decay.
    """
    rows = []
    for name, parameter, scale in named:
        exempt = name.endswith((".bias", "_token", "_tokens")) or parameter.ndim <= 1
        decay = weight_decay
        if exempt or is_position(name):
            decay = 0.0
        rows.append((name, parameter, scale, decay))
    return parameter_groups(rows)


def parameter_groups(
    rows: Iterable[tuple[str, nn.Parameter, float, float]],
) -> list[dict[str, Any]]:
    """One group per (scale, decay) of (name, parameter, scale, decay)."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter, scale, decay in rows:
        empty = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """`average = decay * average + (1 - decay) * model`, of the trained weights.

    The moving average starts as a copy, so what is not trained is right already.
    """
    averages = []
    weights = []
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        if parameter.requires_grad:
            averages.append(local(mean))
            weights.append(local(parameter))
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)


# --- the optimiser in a checkpoint


def optimizer_tensors(*optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimisers' state as flat named tensors, `optimizer.<number of parameter>.<key>`.

    The parameters of several are numbered on, in their order.
    """
    tensors = {}
    first = 0
    for optimizer in optimizers:
        for number, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{first + number}.{key}"] = torch.as_tensor(value)
        first += len(_parameters(optimizer))
    return tensors


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], checkpoint: Checkpoint) -> None:
    """Put back what `optimizer_tensors` gave, sharded as the parameters are.

    Raises:
        CheckpointError: naming file and tensor, for the state of a parameter that does not exist,
            has another shape, or is not whole.
    """
    parameters = []
    for optimizer in optimizers:
        parameters += _parameters(optimizer)
    names = _names_by_parameter(checkpoint)
    keys = set().union(*names.values())

    state: dict[int, dict[str, Tensor]] = {}
    for number, own in names.items():
        values = {key: checkpoint.tensors[name] for key, name in own.items()}
        if number >= len(parameters) or values.keys() != keys:
            _refuse_state(checkpoint, number, len(parameters))

        state[number] = {}
        for key, value in values.items():
            # the step count is one number for the whole parameter
            if value.ndim == 0:
                state[number][key] = value
                continue
            if value.shape != parameters[number].shape:
                _refuse_state(checkpoint, number, len(parameters))
            state[number][key] = shard_like(value, parameters[number])

    first = 0
    for optimizer in optimizers:
        count = len(_parameters(optimizer))
        own_state = {}
        for number in range(count):
            if first + number in state:
                own_state[number] = state[first + number]
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": own_state, "param_groups": groups})
        first += count


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """`restore_optimizers` of one."""
    restore_optimizers([optimizer], checkpoint)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names_by_parameter(checkpoint: Checkpoint) -> dict[int, dict[str, str]]:
    """Number of a parameter -> key of its state -> name of the tensor."""
    names: dict[int, dict[str, str]] = {}
    for name in checkpoint.tensors:
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            names.setdefault(int(number), {})[key] = name
    return names


def _refuse_state(checkpoint: Checkpoint, number: int, count: int) -> NoReturn:
    raise CheckpointError(
        f"{checkpoint.where}: optimizer.{number} is not the state of parameter {number} of "
        f"{count}; it is of another model or version: name another {setting('output_dir')}, or "
        "remove this checkpoint"
    )

"""FSDP2 in a pre-training: attention and MLP of every block are divided among the processes.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 training/pretrain.py ...

    shard_networks(objective)                   # before the first step, after its optimisers
    norm = gradient_norm(parameters)            # whole, in every process

Divided are the matrices of the blocks, of students, decoders, predictors and momentum copies, with
their gradients and moments. Embeddings, norms, heads and CAPI's clustering layer stay whole: a
method calls those by parts, and what they compute runs over the whole batch anyway.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..model.modeling_mim_refiner import MimRefinerLayer
from ..runtime.sharding import local, shard_units
from .objective import Objective


def divided_modules(objective: Objective) -> list[nn.Module]:
    """What each process keeps a share of: attention and MLP of every block."""
    blocks = [module for module in objective.modules() if isinstance(module, MimRefinerLayer)]
    return [part for block in blocks for part in (block.attention, block.mlp)]


def shard_networks(objective: Objective) -> None:
    """Divide the blocks of all networks; the optimisers go on with what became of their parameters.

    Args:
        objective: on its device, before its first step.
    """
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    shard_units(divided_modules(objective))
    parameters = dict(objective.named_parameters())
    for optimizer in objective.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameters[names[id(old)]] for old in group["params"]]
            # one call over many tensors takes either divided or whole ones, and here are both
            group["fused"] = False
            group["foreach"] = False


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the gradients of all parameters, those that are divided among processes too.

    The same in every process.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    divided = [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    if not divided:
        return torch.nn.utils.get_total_norm(gradients)
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = torch.nn.utils.get_total_norm(divided).square()
    dist.all_reduce(square)
    return (square + torch.nn.utils.get_total_norm(whole).square()).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, also of gradients that are divided among processes."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        torch.nn.utils.clip_grad_norm_(parameters, norm)
        return
    factor = (norm / (gradient_norm(parameters) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)

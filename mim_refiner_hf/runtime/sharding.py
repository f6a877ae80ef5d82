"""FSDP2: every process keeps its share of encoder, heads, moving average, gradients and moments.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 training/refine.py ...

    if fsdp2_requested() and world_size() > 1:
        shard(encoder, encoder.layers)            # each block is gathered as it is used, and let go
    parts, places = own_parts(model.state_dict()) # what this process writes into a checkpoint
    shard_like(whole, parameter)                  # what it takes back, at any number of processes

What is computed stays what it was: weights are gathered in fp32, autocast does the rest, and a
gradient is the mean over the processes, as `distributed.average_gradients` has it. The queue and
the batch statistics are whole in every process. On the CPU (gloo) it is the same code. A run begins
with the encoder whole in every process, twice, before it is divided.

Of the launcher's settings of FSDP only `--use_fsdp --fsdp_version 2` are heeded: which modules are
gathered together is said here.
"""

import os
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from .distributed import rank, world_size
from .tensor_files import Place

# Environment variables that `accelerate launch` sets to true, and what is said then.
_INSTEAD = "launch with --use_fsdp --fsdp_version 2 to shard the model"
_SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed is not supported; {_INSTEAD}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM is not supported; {_INSTEAD}",
    "FSDP_OFFLOAD_PARAMS": (
        "--fsdp_offload_params true is not supported; leave it out, or shard over more processes"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "--fsdp_activation_checkpointing true is not supported; use --gradient_checkpointing true"
    ),
}


def fsdp2_requested() -> bool:
    """Whether `accelerate launch --use_fsdp --fsdp_version 2` started this process.

    (Or ACCELERATE_USE_FSDP=true with FSDP_VERSION=2.)

    Raises:
        ValueError: for FSDP 1, DeepSpeed, Megatron-LM, and settings of FSDP2 that are not
        supported.
    """
    fsdp = _is_on("ACCELERATE_USE_FSDP")
    for name, problem in _SWITCHES.items():
        counts = fsdp or name.startswith("ACCELERATE")
        if counts and _is_on(name):
            raise ValueError(problem)

    version = os.environ.get("FSDP_VERSION", "1")
    if fsdp and version != "2":
        raise ValueError(
            f"--fsdp_version {version} is not supported; launch with --use_fsdp --fsdp_version 2"
        )
    if fsdp and os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        raise ValueError(
            "--fsdp_reshard_after_forward false is not supported; "
            "leave it out: gathered blocks are always let go"
        )
    return fsdp


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


# --- modules


def shard(module: nn.Module, units: Iterable[nn.Module]) -> None:
    """Leave to this process its share of every parameter of `module`.

    Args:
        module: on its device, and the same in all processes.
        units: the parts that are gathered one at a time; what is in none of them is one more unit.
    """
    shard_units((*units, module))


def shard_units(units: Iterable[nn.Module]) -> None:
    """Leave to this process its share of the parameters of some modules, and nothing of others.

    Each is gathered when it is called and let go afterwards, and comes before what it is a part of.
    """
    # heads and poolers return views, every step; nothing here writes into a module's output, which
    # is what is warned of
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = None
    for unit in units:
        kind = type(unit)
        mesh = mesh or init_device_mesh(next(unit.parameters()).device.type, (world_size(),))
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, shard_placement_fn=_placement)

        # fully_shard gives the module a class of another name, and transformers goes by the name to
        # record hidden states
        type(unit).__module__ = kind.__module__
        type(unit).__qualname__ = kind.__qualname__


def _placement(parameter: nn.Parameter) -> Shard:
    """The first dimension that the processes divide evenly, such as D of (1, 1, D); or 0."""
    for dim, size in enumerate(parameter.shape):
        if size % world_size() == 0:
            return Shard(dim)
    return Shard(0)


def synchronise(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass reduces the gradients of a sharded module.

    If not, they add up, whole, in every process.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


@torch.no_grad()
def gather_into(module: nn.Module, sharded: nn.Module) -> None:
    """Fill an ordinary module with the weights of a sharded one of its kind, tensor by tensor."""
    source = sharded.state_dict()
    for name, tensor in module.state_dict().items():
        value = source[name]
        if isinstance(value, DTensor):
            value = value.full_tensor()
        tensor.copy_(value)


# --- tensors


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory, without a graph."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    return tensor


def _start_of_part(tensor: DTensor) -> tuple[int, int]:
    """(dimension along which a tensor is sharded, where this process's part begins in it).

    As `torch.chunk` divides it.
    """
    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    mesh = tensor.device_mesh
    size = tensor.shape[placement.dim]
    chunk = -(-size // mesh.size())
    return placement.dim, min(size, mesh.get_local_rank() * chunk)


def own_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """What this process writes of the tensors of a job: its parts of the sharded ones.

    The first process writes the whole ones too.

    Returns:
        The parts on the CPU, and for each sharded one its place in the whole.
    """
    parts = {}
    places: dict[str, Place] = {}
    for name, tensor in tensors.items():
        part = local(tensor)
        if isinstance(tensor, DTensor):
            if not part.numel():
                continue
            dim, start = _start_of_part(tensor)
            offset = [0] * tensor.ndim
            offset[dim] = start
            places[name] = {"shape": list(tensor.shape), "offset": offset}
        elif rank():
            continue

        parts[name] = part.detach().contiguous().cpu()
    return parts, places


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` sharded as `like` is, on its device; as it is where `like` is not sharded.

    Every process passes the same.
    """
    if not isinstance(like, DTensor):
        return whole

    dim, start = _start_of_part(like)
    part = whole.narrow(dim, start, local(like).shape[dim]).clone().to(like.device)
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )

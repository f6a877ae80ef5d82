"""Every tensor of a file in its place, or an error that names it.

placement = place_all("mae.pth", layout, tensors)
placement = of_one_dtype("mae.pth", placement)
check_shapes("mae.pth", layout, placement, encoder.state_dict())
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.configuration_mim_refiner import brief
from ..runtime.files import CheckpointError
from .layout import Layout, listed

logger = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a file went.

    Args:
        tensors: our names with what belongs there.
        came_from: our names with the names in the file.
        dropped: reason -> names in the file that were left behind on purpose.
    """

    tensors: dict[str, Tensor]
    came_from: dict[str, str]
    dropped: dict[str, list[str]]


def place_all(name: str, layout: Layout, tensors: Mapping[str, Tensor]) -> Placement:
    """Every tensor of the file where the rules put it; CheckpointError if they say nothing."""
    placed: dict[str, Tensor] = {}
    came_from: dict[str, str] = {}
    dropped: dict[str, list[str]] = {}
    unknown: list[str] = []
    for source_name, tensor in tensors.items():
        reason = layout.reason_to_drop(source_name)
        if reason is not None:
            dropped.setdefault(reason, []).append(source_name)
            continue
        try:
            parts = layout.place(source_name, tensor)
        # too few dimensions to slice or split
        except (IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{name}: {listed([source_name])} has the unexpected shape "
                f"{brief(list(tensor.shape))}"
            ) from error
        if parts is None:
            unknown.append(source_name)
            continue

        for target, part in parts.items():
            if target in placed:
                raise CheckpointError(
                    f"{name}: both {listed([came_from[target]])} and {listed([source_name])} would "
                    f"fill {listed([target])}"
                )
            placed[target] = part
            came_from[target] = source_name

    if unknown:
        raise CheckpointError(
            f"{name}: {len(unknown)} tensors have no place in {layout.title}: {listed(unknown)}"
        )
    if not placed:
        raise _nothing_placed(name, layout, dropped)
    if layout.rename is not None:
        names = layout.rename(placed)
        placed = {names[key]: tensor for key, tensor in placed.items()}
        came_from = {names[key]: origin for key, origin in came_from.items()}
    if layout.finish is not None:
        placed = layout.finish(placed)
    return Placement(placed, came_from, dropped)


def _nothing_placed(name: str, layout: Layout, dropped: dict[str, list[str]]) -> CheckpointError:
    """The error for a file whose tensors are not an encoder's."""
    where = " or ".join(".".join(path) or "its top level" for path in layout.paths)
    found = f"nothing under {where}"
    if dropped:
        counts = [f"{reason}: {len(names)} tensors" for reason, names in dropped.items()]
        found = f"only {'; '.join(counts)}"
    return CheckpointError(
        f"{name} holds no encoder of {layout.title}, {found}; load the full checkpoint"
    )


def check_shapes(
    name: str, layout: Layout, placement: Placement, wanted: Mapping[str, Tensor]
) -> None:
    """All or error: exactly the encoder's tensors, in its shapes."""
    placed = placement.tensors
    missing = [key for key in wanted if key not in placed]
    if missing:
        raise CheckpointError(
            f"{name}: {len(missing)} of {len(wanted)} {layout.family} tensors are missing: "
            f"{listed(missing)}"
        )
    surplus = [key for key in placed if key not in wanted]
    if surplus:
        raise CheckpointError(
            f"{name}: {len(surplus)} tensors have no place in {layout.title}: {listed(surplus)}"
        )

    misshapen = {}
    for key, tensor in placed.items():
        if tensor.shape != wanted[key].shape:
            found = brief(list(tensor.shape))
            misshapen[key] = f" is {found}, expected {list(wanted[key].shape)}"
    _refuse(name, placement, "have wrong shapes", misshapen)


def of_one_dtype(name: str, placement: Placement) -> Placement:
    """All tensors as floats of one dtype, before anything is computed with them.

    Where they are of several, float32: norms that a training in half precision keeps, a table of
    positions in float64. A line says so.

    Raises:
        CheckpointError: for whole and complex numbers, NaN and infinity.
    """
    broken: dict[str, str] = {}
    for key, tensor in placement.tensors.items():
        if tensor.dtype not in _DTYPES:
            broken[key] = f" is {tensor.dtype}"
        elif not tensor.isfinite().all():
            broken[key] = ""
    _refuse(name, placement, "hold NaN, infinite or integer values", broken)

    kinds = Counter(tensor.dtype for tensor in placement.tensors.values())
    if len(kinds) == 1:
        return placement
    counted = [f"{count} {dtype}" for dtype, count in kinds.most_common()]
    counts = ", ".join(counted).replace("torch.", "")
    logger.warning("%s: its tensors are of several dtypes (%s); read as float32", name, counts)
    tensors = {key: tensor.float() for key, tensor in placement.tensors.items()}
    placement = replace(placement, tensors=tensors)
    too_large = {key: "" for key, tensor in tensors.items() if not tensor.isfinite().all()}
    _refuse(name, placement, "are too large for float32", too_large)
    return placement


def _refuse(name: str, placement: Placement, problem: str, broken: Mapping[str, str]) -> None:
    """CheckpointError that lists the broken tensors, if any: our name -> what follows it."""
    if not broken:
        return
    named = []
    for key, what in broken.items():
        # what `finish` has made is of several names, or of a part of one
        origin = placement.came_from.get(key, key)
        if origin != key:
            what += f" (from {origin})"
        named.append(key + what)
    raise CheckpointError(f"{name}: {len(broken)} tensors {problem}: {listed(named)}")

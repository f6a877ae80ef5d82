"""`load_encoder`: any known checkpoint as a `MimRefinerModel`, every tensor placed or an error. No pickle is ever executed.

    from mim_refiner_hf.conversion import load_encoder
    encoder = load_encoder("facebook/vit-mae-large")             # Hub name, local folder, or an original .pth/.pt/.th file
    print(encoder.load_report)                                   # vit_mae: 390 of 390 placed; decoder: 132 dropped
    pixel_values = encoder.image_processor(image, return_tensors="pt").pixel_values

Read top-down: read the source (`read.py`), recognise its family (a row of `layouts.LAYOUTS`), place every tensor, read the
configuration off the shapes, check, build.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..configuration_mim_refiner import MimRefinerConfig
from ..image_processing_mim_refiner import MimRefinerImageProcessor
from ..modeling_mim_refiner import MimRefinerModel
from .layout import CLS_POSITION, CLS_TOKEN, POSITIONS, Layout, stated
from .layouts import CLASSIFIER, DECODER, LAYOUTS
from .read import CheckpointError, Source, listed, read_source

logger = logging.getLogger(__name__)

HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 2560: 32}
"""Attention heads of the published plain ViTs: head dim 64 up to L, 80 for H and 2B (METHOD: shapes)."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_encoder` did: `str(report)` is one line such as `mae: 198 of 198 placed; decoder: 24 dropped`.

    Args:
        family: the family that was recognised, a name of `layouts.LAYOUTS`.
        placed: encoder tensors filled from the source.
        total: encoder tensors there are (equal to `placed`, or loading would have raised).
        dropped: reason -> names of source tensors left behind on purpose.
    """

    family: str
    placed: int
    total: int
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.family}: {self.placed} of {self.total} placed"]
        return "; ".join(parts + [f"{reason}: {len(names)} dropped" for reason, names in self.dropped.items()])


def load_encoder(
    source: str | Path, *, family: str | None = None, revision: str | None = None, num_heads: int | None = None
) -> MimRefinerModel:
    """Load any known checkpoint into our encoder, in eval mode and in the dtype it was saved in.

    Args:
        source: a Hub name, a local model folder, or an original .pth/.pt/.th/.bin/.safetensors file.
        family: a family name of `layouts.LAYOUTS`, for a file that carries no sign of its own; None recognises it.
        revision: branch, tag or commit of a Hub name.
        num_heads: attention heads, for a file that neither states them nor has one of the published widths.

    Returns:
        The encoder, with `load_report` (a `LoadReport`) and `image_processor` (the source's own mean, std and size, or
        ImageNet's at the encoder's native size) attached.

    Raises:
        FileNotFoundError: the path does not exist.
        CheckpointError: the source is unreadable or would execute code, is of no known family, is a classifier or a decoder, or
            a tensor is missing, left over, of a wrong shape, or not finite.
    """
    found = read_source(source, revision)
    layout, tensors = recognise(found, family)
    placed, dropped = place(found.name, layout, tensors)
    config = read_config(found, layout, placed, num_heads)
    with torch.device("meta"):  # shapes only; every weight comes from the source
        encoder = MimRefinerModel(config)
    check(found.name, layout, placed, encoder.state_dict())
    dtype = placed["embeddings.patch_embeddings.weight"].dtype
    own = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in placed.items()}  # no views of a mapped file
    encoder.load_state_dict(own, assign=True)
    encoder.train(False)
    report = LoadReport(layout.family, len(own), len(encoder.state_dict()), dropped)
    vars(encoder).update(load_report=report, image_processor=image_processor(config, found.preprocessing))
    logger.info("%s: %s", found.name, report)
    return encoder


# --- recognise and place ------------------------------------------------------------------------------------------------------


def named_tensors(contents: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries in file order, names joined by dots."""
    for key, value in contents.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{prefix}{key}.")


def state_dict_of(layout: Layout, contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under the first of the layout's paths that exists in this container; empty if none does."""
    for path in layout.paths:
        inner: Any = contents
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return dict(named_tensors(inner))
    return {}


def recognise(found: Source, family: str | None) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of this source and its state dict: by `family`, by `model_type`, or by the names of the tensors."""
    names = [name for name, _ in named_tensors(found.contents)]
    if heads := [name for name in names if re.fullmatch(CLASSIFIER, name)]:
        raise CheckpointError(
            f"{found.name} is a fine-tuned classifier ({listed(heads)}), not a pre-trained encoder: load the checkpoint it was "
            "fine-tuned from, or save its encoder alone, without these tensors"
        )
    model_type, kind = found.config.get("model_type"), stated("ctor_kwargs", "kind")(found.contents)
    if model_type is None and any(kind in layout.model_types for layout in LAYOUTS):
        model_type = kind
    for layout in LAYOUTS:
        tensors = state_dict_of(layout, found.contents)
        if family is not None:
            matches = layout.family == family
        elif model_type is not None:
            matches = model_type in layout.model_types
        else:
            matches = layout.recognises(list(tensors))
        if matches:
            return layout, tensors
    if family is not None:
        raise CheckpointError(f"family={family!r} is unknown; allowed: {', '.join(layout.family for layout in LAYOUTS)}")
    if model_type is not None:
        known = [name for layout in LAYOUTS for name in layout.model_types]
        raise CheckpointError(f"{found.name} has model_type={model_type!r}, not a plain ViT known here ({', '.join(known)})")
    if names and all(re.search(DECODER, name) for name in names):
        raise CheckpointError(f"{found.name} holds a decoder only ({listed(names)}), no encoder; load the full checkpoint")
    hint = "transformers' weights need the config.json beside them: give their folder"
    raise CheckpointError(
        f"{found.name} is of no known family; top-level keys: {listed([str(key) for key in found.contents])}; tensors: "
        f"{listed(names) or 'none'}; known: {', '.join(layout.title for layout in LAYOUTS)}; "
        + (hint if any("embeddings.patch_embeddings" in name for name in names) else "if it is one of them, pass family=")
    )


def place(name: str, layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Our names with their tensors (CLS position folded in), and what was dropped on purpose; all or error."""
    placed: dict[str, Tensor] = {}
    came_from: dict[str, str] = {}
    dropped: dict[str, list[str]] = {}
    unknown: list[str] = []
    for source_name, tensor in tensors.items():
        try:
            result = layout.place(source_name, tensor)
        except (
            IndexError,
            RuntimeError,
            ValueError,
        ) as error:  # too few dimensions to slice or split
            raise CheckpointError(f"{name}: {source_name} has the unexpected shape {list(tensor.shape)}") from error
        if result is None:
            unknown.append(source_name)
        elif isinstance(result, str):
            dropped.setdefault(result, []).append(source_name)
        else:
            for target in result:
                if target in placed:
                    raise CheckpointError(f"{name}: both {came_from[target]} and {source_name} would fill {target}")
                came_from[target] = source_name
            placed.update(result)
    if unknown:
        raise CheckpointError(f"{name}: {len(unknown)} tensors have no place in {layout.title}: {listed(unknown)}")
    if not placed:
        where = " or ".join(".".join(path) or "its top level" for path in layout.paths)
        what = "; ".join(f"{reason}: {len(names)} tensors" for reason, names in dropped.items())
        found = f"only {what}" if what else f"nothing under {where}"
        raise CheckpointError(f"{name} holds no encoder of {layout.title}, {found}; load the full checkpoint")
    if layout.finish is not None:
        placed = layout.finish(placed)
    if CLS_POSITION in placed and CLS_TOKEN in placed:
        placed[CLS_TOKEN] = placed[CLS_TOKEN] + placed.pop(CLS_POSITION)
    return placed, dropped


# --- configure, check ---------------------------------------------------------------------------------------------------------


def read_shapes(name: str, placed: dict[str, Tensor]) -> dict[str, Any]:
    """Every field of the configuration that the placed tensors tell."""
    try:
        width, channels, patch, _ = placed["embeddings.patch_embeddings.weight"].shape
        mlp = placed["layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        seen = listed(list(placed))
        raise CheckpointError(f"{name} has no patch embedding (D, C, P, P) or no first block; it has {seen}") from error
    tables = {key: tensor for key, tensor in placed.items() if key.endswith("relative_position_bias.table")}
    relative = "" if not tables else "shared_relative" if "relative_position_bias.table" in tables else "relative"
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "intermediate_size": mlp,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in placed if key.startswith("layers.")),
        "num_attention_heads": HEADS_OF_WIDTH.get(width),
        "use_cls_token": CLS_TOKEN in placed,
        "embedding_norm": "embeddings.norm.weight" in placed,
        "final_norm": "norm.weight" in placed,
        "bias": "all" if "layers.0.attention.k_proj.bias" in placed else "no_key",
        "layer_scale_init": 0.1 if "layers.0.layer_scale1.weight" in placed else None,
        "position_encoding": "+".join(kind for kind in ("absolute" if POSITIONS in placed else "", relative) if kind),
    }
    grid: tuple[int, int] | None = None
    if POSITIONS in placed:
        positions = placed[POSITIONS]
        side = math.isqrt(positions[0, ..., 0].numel())
        grid = (positions.shape[1], positions.shape[2]) if positions.ndim == 4 else (side, side)
        placed[POSITIONS] = positions.flatten(1, -2)
    elif tables:
        rows, fields["num_attention_heads"] = next(iter(tables.values())).shape
        grid = ((math.isqrt(rows - 3) + 1) // 2,) * 2  # (2 n - 1)^2 offsets and three rows for CLS
    if grid is not None:
        fields["image_size"] = grid[0] * patch if grid[0] == grid[1] else [grid[0] * patch, grid[1] * patch]
    return fields


def read_config(found: Source, layout: Layout, placed: dict[str, Tensor], num_heads: int | None) -> MimRefinerConfig:
    """The encoder's configuration: what shapes tell, what the family fixes, and above both what the source itself states."""
    states = {name: value for name, value in found.config.items() if name in MimRefinerConfig.__annotations__}
    for name, read in layout.facts.items():
        states[name] = read(found.config or found.contents)
    states = {name: value for name, value in states.items() if value is not None}
    fields = read_shapes(found.name, placed) | dict(layout.settings) | states
    if num_heads is not None:
        if states.get("num_attention_heads", num_heads) != num_heads:
            raise CheckpointError(
                f"num_heads={num_heads}, but {found.name} states {states['num_attention_heads']}; leave it out"
            )
        fields["num_attention_heads"] = num_heads
    if fields["num_attention_heads"] is None:
        raise CheckpointError(
            f"{found.name} does not state its number of attention heads, and its width {fields['hidden_size']} is none of the "
            f"published ones ({', '.join(map(str, HEADS_OF_WIDTH))}); pass num_heads="
        )
    try:
        config = MimRefinerConfig(**fields)
    except (StrictDataclassError, ValueError) as error:
        raise CheckpointError(f"{found.name} describes an encoder that cannot be built: {error.__cause__ or error}") from error
    config.name_or_path = found.name
    return config


def check(name: str, layout: Layout, placed: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """All or error: exactly the encoder's tensors, in its shapes, all finite."""
    if missing := [key for key in wanted if key not in placed]:
        raise CheckpointError(f"{name}: {len(missing)} of {len(wanted)} {layout.family} tensors are missing: {listed(missing)}")
    if surplus := [key for key in placed if key not in wanted]:
        raise CheckpointError(f"{name}: {len(surplus)} tensors have no place in {layout.title}: {listed(surplus)}")
    shapes = [
        f"{key} is {list(placed[key].shape)}, expected {list(wanted[key].shape)}"
        for key in wanted
        if placed[key].shape != wanted[key].shape
    ]
    if shapes:
        raise CheckpointError(f"{name}: {len(shapes)} tensors have wrong shapes: {listed(shapes)}")
    if broken := [key for key, tensor in placed.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]:
        raise CheckpointError(f"{name}: {len(broken)} tensors hold NaN, infinite or integer values: {listed(broken)}")


def image_processor(config: MimRefinerConfig, source: Mapping[str, Any]) -> MimRefinerImageProcessor:
    """The preprocessing that goes with an encoder: from its `preprocessor_config.json`, else ImageNet's at native size."""
    native = dict(zip(("height", "width"), config.image_hw, strict=True))
    size, crop = (  # an int, as in old files, is a square
        {"height": value, "width": value} if isinstance(value, int) else dict(value or native)
        for value in (source.get("size"), source.get("crop_size"))
    )
    if "height" in size and not source.get("do_center_crop"):
        crop = size
    mean, std = list(MimRefinerImageProcessor.image_mean), list(MimRefinerImageProcessor.image_std)
    if config.num_channels != 3:  # ImageNet's average grey for every channel
        mean, std = ([sum(values) / 3] * config.num_channels for values in (mean, std))
    return MimRefinerImageProcessor(
        size={"shortest_edge": max(size.values())},
        crop_size=crop,
        image_mean=source.get("image_mean", mean),
        image_std=source.get("image_std", std),
        resample=source.get("resample", MimRefinerImageProcessor.resample),
        do_convert_rgb=config.num_channels == 3,
    )

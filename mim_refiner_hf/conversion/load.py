"""`load_encoder`: any known checkpoint as a `MimRefinerModel`, every tensor placed or an error. No pickle is ever executed.

    from mim_refiner_hf.conversion import load_encoder
    encoder = load_encoder("facebook/vit-mae-large")             # Hub name, local folder, or an original .pth/.pt/.th file
    encoder = load_encoder("vit_base_patch16_224.mae")           # a name of timm.create_model: timm/vit_base_patch16_224.mae
    print(encoder.load_report)                                   # vit_mae: 390 of 390 placed; decoder: 132 dropped
    pixel_values = encoder.image_processor(image, return_tensors="pt").pixel_values

Read top-down: read the source (`read.py`), recognise its family (a row of `layouts.LAYOUTS`), place every tensor, read the
configuration off the shapes, check, build.

Names and shapes tell a tensor that is lost, renamed, misshapen or broken. Two of the same shape under each other's names, or a
square matrix transposed, they cannot tell: folders that this package wrote carry a digest of every tensor for that (`digests.py`).
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.image_processing_mim_refiner import MimRefinerImageProcessor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import CheckpointError
from .layout import CLS_POSITION, CLS_TOKEN, POSITIONS, Layout, Source, listed, stated
from .layouts import CLASSIFIER, DECODER, LAYOUTS
from .read import read_source
from .timm_models import in_our_words

logger = logging.getLogger(__name__)

KERNEL = "embeddings.patch_embeddings.weight"
BIAS_TABLE = "relative_position_bias.table"

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
        recognised_by: what said that it is this family, such as `model_type='vit_mae'`, or tensors with their shapes.
    """

    family: str
    placed: int
    total: int
    dropped: dict[str, list[str]] = field(default_factory=dict)
    recognised_by: str = ""

    def __str__(self) -> str:
        parts = [f"{self.family}: {self.placed} of {self.total} placed"]
        return "; ".join(
            parts + [f"{reason}: {len(names)} dropped" for reason, names in self.dropped.items()]
        )


def load_encoder(
    source: str | Path,
    *,
    family: str | None = None,
    revision: str | None = None,
    num_heads: int | None = None,
) -> MimRefinerModel:
    """Load any known checkpoint into our encoder, in eval mode and in the dtype it was saved in.

    Args:
        source: a Hub name, a local model folder, an original .pth/.pt/.th/.bin/.safetensors file, or a name of `zoo.ZOO`.
        family: a family name of `layouts.LAYOUTS`, for a file that carries no sign of its own; None recognises it.
        revision: branch, tag or commit of a Hub name.
        num_heads: attention heads, for a file that neither states them nor has one of the published widths.

    Returns:
        The encoder, with `load_report` (a `LoadReport`) and `image_processor` (the source's own mean, std and size, or
        ImageNet's at the encoder's native size) attached.

    Raises:
        FileNotFoundError: the path does not exist.
        ConnectionError: the Hub does not answer, not even asked again.
        CheckpointError: the source is unreadable or would execute code, is of no known family, is a classifier or a decoder, or
            a tensor is missing, left over, of a wrong shape or dtype, not finite, or not the one that its digest describes.
    """
    found = in_our_words(read_source(source, revision))
    layout, tensors, recognised_by = recognise(found, family or found.family)
    placed, came_from, dropped = place(found.name, layout, tensors)
    config = read_config(found, layout, placed, num_heads)
    with torch.device("meta"):  # shapes only; every weight comes from the source
        encoder = MimRefinerModel(config)
    check(found.name, layout, placed, came_from, encoder.state_dict())
    dtype = placed[KERNEL].dtype
    own = {
        name: tensor.to(dtype, copy=True).contiguous() for name, tensor in placed.items()
    }  # no views of a mapped file
    encoder.load_state_dict(own, assign=True)
    encoder.train(False)
    report = LoadReport(layout.family, len(own), len(encoder.state_dict()), dropped, recognised_by)
    preprocessing = {**layout.preprocessing(found.contents), **found.preprocessing}
    vars(encoder).update(load_report=report, image_processor=image_processor(config, preprocessing))
    logger.info("%s: %s (recognised by %s)", found.name, report, recognised_by)
    return encoder


# --- recognise and place ------------------------------------------------------------------------------------------------------


def named_tensors(contents: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries in file order, names joined by dots."""
    for key, value in contents.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{prefix}{key}.")


def state_dict_of(layout: Layout, contents: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The first of the layout's paths that exists in this container, and the tensors under it; empty if none does."""
    for path in layout.paths:
        inner: Any = contents
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return ".".join(path), dict(named_tensors(inner))
    return "", {}


def recognise(found: Source, family: str | None) -> tuple[Layout, dict[str, Tensor], str]:
    """The layout of this source, its state dict, and what told: `family`, the `model_type`, or tensors of the file."""
    model_type, kind = found.config.get("model_type"), stated("ctor_kwargs", "kind")(found.contents)
    if model_type is None and any(kind in layout.model_types for layout in LAYOUTS):
        model_type = kind
    for layout in LAYOUTS:
        where, tensors = state_dict_of(layout, found.contents)
        if family is not None:
            told = f"family={family!r}" if layout.family == family else ""
        elif model_type is not None:
            told = f"model_type={model_type!r}" if model_type in layout.model_types else ""
        else:
            told = ", ".join(
                f"{name} {list(tensors[name].shape)}" for name in layout.recognises(list(tensors))
            )
        if told:
            refuse_classifier(
                found.name, [name for name in tensors if layout.reason_to_drop(name) is None]
            )
            return layout, tensors, f"{told} under {where!r}" if where else told
    raise unknown_family(found, family, model_type)


def refuse_classifier(source: str, names: list[str]) -> None:
    """CheckpointError where tensors that this family does not expect belong to a fine-tuned classifier."""
    if heads := [name for name in names if re.fullmatch(CLASSIFIER, name)]:
        raise CheckpointError(
            f"{source} is a fine-tuned classifier ({listed(heads)}), not a pre-trained encoder: load the checkpoint it was "
            "fine-tuned from, or save its encoder alone, without these tensors"
        )


def unknown_family(found: Source, family: str | None, model_type: str | None) -> CheckpointError:
    """The error for a source that no layout recognises: what was seen in it, and what would have been known."""
    if family is not None:
        return CheckpointError(
            f"family={family!r} is unknown; allowed: {', '.join(layout.family for layout in LAYOUTS)}"
        )
    if model_type is not None:
        known = [name for layout in LAYOUTS for name in layout.model_types]
        return CheckpointError(
            f"{found.name} has model_type={model_type!r}, not a plain ViT known here ({', '.join(known)})"
        )
    tensors = dict(named_tensors(found.contents))
    refuse_classifier(found.name, list(tensors))
    if tensors and all(re.search(DECODER, name) for name in tensors):
        return CheckpointError(
            f"{found.name} holds a decoder only ({listed(list(tensors))}), no encoder; load the full checkpoint"
        )
    hint = "transformers' weights need the config.json beside them: give their folder"
    return CheckpointError(
        f"{found.name} is of no known family; top-level keys: {listed([str(key) for key in found.contents])}; tensors: "
        f"{listed([f'{name} {list(tensor.shape)}' for name, tensor in tensors.items()]) or 'none'}; "
        f"known: {', '.join(layout.title for layout in LAYOUTS)}; "
        + (
            hint
            if any("embeddings.patch_embeddings" in name for name in tensors)
            else "if it is one of them, pass family="
        )
    )


def place(
    name: str, layout: Layout, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[str]]]:
    """Our names with their tensors (CLS position folded in), with their names in the file, and what was dropped on purpose."""
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
            raise CheckpointError(
                f"{name}: {source_name} has the unexpected shape {list(tensor.shape)}"
            ) from error
        if result is None:
            unknown.append(source_name)
        elif isinstance(result, str):
            dropped.setdefault(result, []).append(source_name)
        else:
            for target in result:
                if target in placed:
                    raise CheckpointError(
                        f"{name}: both {came_from[target]} and {source_name} would fill {target}"
                    )
                came_from[target] = source_name
            placed.update(result)
    if unknown:
        raise CheckpointError(
            f"{name}: {len(unknown)} tensors have no place in {layout.title}: {listed(unknown)}"
        )
    if not placed:
        where = " or ".join(".".join(path) or "its top level" for path in layout.paths)
        what = "; ".join(f"{reason}: {len(names)} tensors" for reason, names in dropped.items())
        found = f"only {what}" if what else f"nothing under {where}"
        raise CheckpointError(
            f"{name} holds no encoder of {layout.title}, {found}; load the full checkpoint"
        )
    if layout.finish is not None:
        placed, came_from = layout.finish(placed), layout.finish(came_from)
    if CLS_POSITION in placed and CLS_TOKEN in placed:
        token, position = placed[CLS_TOKEN], placed.pop(CLS_POSITION)
        if (token.shape, token.dtype) == (
            position.shape,
            position.dtype,
        ):  # else one of them is wrong, which `check` will say
            placed[CLS_TOKEN] = token + position
    return placed, came_from, dropped


# --- configure, check ---------------------------------------------------------------------------------------------------------


def common(sizes: Iterable[Any]) -> Any:
    """The most frequent value: one misshapen tensor among many must not pass for the rule."""
    return Counter(sizes).most_common(1)[0][0]


def read_depth(name: str, placed: Mapping[str, Tensor]) -> int:
    """The number of blocks, of which none may be absent."""
    blocks = {int(match[1]) for key in placed if (match := re.match(r"layers\.(\d+)\.", key))}
    if not blocks or max(blocks) + 1 != len(blocks):
        last = [key for key in placed if key.startswith(f"layers.{max(blocks, default=0)}.")]
        raise CheckpointError(
            f"{name} has {len(blocks)} transformer blocks, not one after the other; the last is {listed(last)}"
        )
    return len(blocks)


def read_shapes(name: str, placed: dict[str, Tensor]) -> dict[str, Any]:
    """Every field of the configuration that the placed tensors tell; a feature is there if any of its tensors is."""
    kernel = placed.get(KERNEL, torch.empty(0))
    if kernel.ndim != 4:
        what = (
            f"is {list(kernel.shape)}, expected (D, C, P, P)" if KERNEL in placed else "is missing"
        )
        raise CheckpointError(
            f"{name} has no patch embedding: {KERNEL} {what}; it has {listed(list(placed))}"
        )
    depth = read_depth(name, placed)
    _, channels, patch, _ = kernel.shape
    width = common(
        [
            len(kernel),
            *(tensor.numel() for key, tensor in placed.items() if key.endswith(".norm1.weight")),
        ]
    )
    mlp = [
        tensor.shape[0]
        for key, tensor in placed.items()
        if key.endswith(".mlp.fc1.weight") and tensor.ndim
    ]
    tables = [tensor.shape for key, tensor in placed.items() if key.endswith(BIAS_TABLE)]
    relative = "" if not tables else "shared_relative" if BIAS_TABLE in placed else "relative"
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "intermediate_size": common(mlp or [width]),
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS_OF_WIDTH.get(width),
        "use_cls_token": CLS_TOKEN in placed or CLS_POSITION in placed,
        "num_register_tokens": placed["embeddings.register_tokens"].numel() // width
        if "embeddings.register_tokens" in placed
        else 0,
        "predictor_layers": len(
            {key.split(".")[2] for key in placed if key.startswith("predictor.blocks.")}
        ),
        "embedding_norm": any(key.startswith("embeddings.norm.") for key in placed),
        "final_norm": any(key.startswith("norm.") for key in placed),
        "bias": "all" if any(key.endswith(".k_proj.bias") for key in placed) else "no_key",
        "layer_scale_init": 0.1 if any(".layer_scale" in key for key in placed) else None,
        "position_encoding": "+".join(
            kind for kind in ("absolute" if POSITIONS in placed else "", relative) if kind
        ),
    }
    grid: tuple[int, int] | None = None
    if angles := [
        tensor.numel() // 2 for key, tensor in placed.items() if key.endswith(".rope.frequencies")
    ]:
        fields["num_attention_heads"] = width // max(common(angles), 1)  # (2, head_dim) each
    for rows, *heads in tables:
        side = math.isqrt(max(rows - 3, 0))
        if (
            side % 2 and side**2 == rows - 3 and len(heads) == 1
        ):  # (2 n - 1)^2 offsets and three rows for CLS
            fields["num_attention_heads"], grid = heads[0], ((side + 1) // 2,) * 2
    positions = placed.get(POSITIONS, torch.empty(0))
    if (
        positions.ndim in (3, 4) and positions.numel()
    ):  # (1, N, D) or (1, rows, columns, D); else `check` says it is misshapen
        side = math.isqrt(positions[0, ..., 0].numel())
        grid = (positions.shape[1], positions.shape[2]) if positions.ndim == 4 else (side, side)
        placed[POSITIONS] = positions.flatten(1, -2)
    if grid is not None:
        fields["image_size"] = (
            grid[0] * patch if grid[0] == grid[1] else [grid[0] * patch, grid[1] * patch]
        )
    return fields


def read_config(
    found: Source, layout: Layout, placed: dict[str, Tensor], num_heads: int | None
) -> MimRefinerConfig:
    """The encoder's configuration: what shapes tell, what the family fixes, and above both what the source itself states."""
    states = {
        name: value
        for name, value in found.config.items()
        if name in MimRefinerConfig.__annotations__
    }
    for name, read in layout.facts.items():
        states[name] = read(found.config or found.contents)
    states = {name: value for name, value in states.items() if value is not None}
    fields = read_shapes(found.name, placed) | dict(layout.settings) | states
    if not fields["position_encoding"]:
        raise CheckpointError(
            f"{found.name}: {POSITIONS} is missing, and there is no {BIAS_TABLE} either"
        )
    fields.setdefault(
        "image_size", 224 // fields["patch_size"] * fields["patch_size"]
    )  # rope, or positions that `check` will name
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
        raise CheckpointError(
            f"{found.name} describes an encoder that cannot be built: {error.__cause__ or error}"
        ) from error
    config.name_or_path = found.name
    return config


def check(
    name: str,
    layout: Layout,
    placed: Mapping[str, Tensor],
    came_from: Mapping[str, str],
    wanted: Mapping[str, Tensor],
) -> None:
    """All or error: exactly the encoder's tensors, in its shapes, of one dtype, all finite."""
    if missing := [key for key in wanted if key not in placed]:
        raise CheckpointError(
            f"{name}: {len(missing)} of {len(wanted)} {layout.family} tensors are missing: {listed(missing)}"
        )
    if surplus := [key for key in placed if key not in wanted]:
        raise CheckpointError(
            f"{name}: {len(surplus)} tensors have no place in {layout.title}: {listed(surplus)}"
        )
    dtype = common(tensor.dtype for tensor in placed.values())
    problems = {
        "have wrong shapes": lambda key, tensor: (
            f" is {list(tensor.shape)}, expected {list(wanted[key].shape)}"
            if tensor.shape != wanted[key].shape
            else None
        ),
        f"are not {dtype} as the others are": lambda key, tensor: (
            f" is {tensor.dtype}" if tensor.dtype != dtype else None
        ),
        "hold NaN, infinite or integer values": lambda key, tensor: (
            None if tensor.is_floating_point() and tensor.isfinite().all() else ""
        ),
    }
    for problem, find in problems.items():
        broken = {
            key: what for key, tensor in placed.items() if (what := find(key, tensor)) is not None
        }
        if broken:
            named = [
                key + what + ("" if came_from[key] == key else f" (from {came_from[key]})")
                for key, what in broken.items()
            ]
            raise CheckpointError(f"{name}: {len(broken)} tensors {problem}: {listed(named)}")


def image_processor(
    config: MimRefinerConfig, source: Mapping[str, Any]
) -> MimRefinerImageProcessor:
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

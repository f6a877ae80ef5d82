"""`load_encoder`: any known checkpoint as a `MimRefinerModel`, every tensor placed or an error.

    encoder = load_encoder("facebook/vit-mae-large")      # Hub name, folder, original .pth/.pt/.th
    encoder = load_encoder("vit_base_patch16_224.mae")    # what timm.create_model calls so
    encoder = load_encoder(model)           # a model object of transformers or timm
    print(encoder.load_report)              # vit_mae: 390 of 390 placed; decoder: 132 dropped
    pixel_values = encoder.image_processor(image, return_tensors="pt").pixel_values

Read top-down: read the source (`read.py`), recognise its family (one of `layouts.LAYOUTS`), place
every tensor, read the configuration off the shapes (`shapes.py`), check, build.

Names and shapes tell a tensor that is lost, renamed, misshapen or broken. Two of the same shape
under each other's names, or a square matrix transposed, they cannot tell: folders that this package
wrote carry a digest of every tensor for that (`digests.py`).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model.configuration_mim_refiner import (
    LARGEST_SIDE,
    ConfigurationError,
    MimRefinerConfig,
    brief,
    refuse_newer_format,
)
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import CheckpointError
from ..runtime.wording import setting
from .birder_models import birder_in_our_words
from .claims import check_claims, check_sizes
from .containers import (
    InnerEncoder,
    inner_encoder,
    named_tensors,
    teacher_beside,
    without_wrappers,
)
from .layout import POSITIONS, EncoderFields, Layout, Source, listed, stated
from .layouts import CLASSIFIER, DECODER, LAYOUTS
from .licence import saved_licence
from .model_objects import own_encoder, source_of_object
from .placement import check_shapes, of_one_dtype, place_all
from .positions import Size, as_size, check_stated_size, settle_positions, shape_as_ours
from .preprocessing import for_channels, image_processor, saved_preprocessing
from .read import read_source
from .shapes import BIAS_TABLE, HEADS_OF_WIDTH, KERNEL, read_shapes
from .timm_models import in_our_words
from .transformers_layouts import TRANSFORMERS_LAYOUTS
from .transformers_models import stated_in_full, why_not

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What `load_encoder` did; in a line, `mae: 198 of 198 placed; decoder: 24 dropped`.

    Args:
        family: the family that was recognised, a name of `layouts.LAYOUTS`.
        placed: encoder tensors filled from the source.
        total: encoder tensors there are (equal to `placed`, or loading would have raised).
        dropped: reason -> names of source tensors left behind on purpose.
        recognised_by: what said that it is this family, such as `model_type='vit_mae'`, or tensors
            with their shapes.
    """

    family: str
    placed: int
    total: int
    dropped: dict[str, list[str]] = field(default_factory=dict)
    recognised_by: str = ""

    def __str__(self) -> str:
        parts = [f"{self.family}: {self.placed} of {self.total} placed"]
        parts += [f"{reason}: {len(names)} dropped" for reason, names in self.dropped.items()]
        return "; ".join(parts)


def load_encoder(
    source: str | Path | nn.Module,
    *,
    family: str | None = None,
    revision: str | None = None,
    num_heads: int | None = None,
    image_size: int | Sequence[int] | None = None,
) -> MimRefinerModel:
    """Load any known checkpoint into our encoder, in eval mode and in the dtype it was saved in.

    In float32 where that would round what is computed on the way, tokens with their positions.

    Args:
        source: a Hub name, a local model folder, an original .pth/.pt/.th/.bin/.safetensors file,
            a name of `zoo.ZOO`, or a model object: of transformers or timm (copied), or an encoder
            of ours (given back as it is).
        family: a family name of `layouts.LAYOUTS`, for a file that carries no sign of its own; None
            recognises it.
        revision: branch, tag or commit of a Hub name.
        num_heads: attention heads, for a file that neither states them nor has one of the published
            widths.
        image_size: pixels, (height, width) or the side of a square, of the images that the encoder
            was trained on, for a file that does not state them; without it a grid is square.

    Returns:
        The encoder, with `load_report` (a `LoadReport`), `image_processor` (the source's own mean,
        std and size, or ImageNet's at the encoder's native size) and `licence` (a `Licence`, as the
        source's card or the zoo states it) attached.

    Raises:
        FileNotFoundError: the path does not exist.
        ConnectionError: the Hub does not answer, not even asked again.
        CheckpointError: the source is unreadable or would execute code, is of no known family, is a
            classifier or a decoder, or a tensor is missing, left over, of a wrong shape or dtype,
            not finite, or not the one that its digest describes.
    """
    if not isinstance(source, str | Path):
        own = own_encoder(source)
        if own is not None:
            return _equipped(own)
        found = source_of_object(source)
    else:
        found = in_our_words(read_source(source, revision))
    return encoder_from(found, family=family, num_heads=num_heads, image_size=image_size)


def encoder_from(
    found: Source,
    *,
    family: str | None = None,
    num_heads: int | None = None,
    image_size: int | Sequence[int] | None = None,
) -> MimRefinerModel:
    """The encoder of a source that was read already; arguments and errors as of `load_encoder`."""
    found = birder_in_our_words(found, family or found.family)
    # another format may name its tensors otherwise
    if found.config.get("model_type") == MimRefinerConfig.model_type:
        _refuse_newer(found)
    found = stated_in_full(found)
    layout, tensors, recognised_by = _recognise(found, family or found.family)
    placement = place_all(found.name, layout, tensors)
    placement = of_one_dtype(found.name, placement)
    if found.finish is not None:
        placement = replace(placement, tensors=found.finish(placement.tensors))
    size = _settle(found, placement.tensors, image_size)
    config = _read_config(found, layout, placement.tensors, num_heads, size)
    shape_as_ours(placement.tensors)

    # shapes only: every weight comes from the source
    with torch.device("meta"):
        encoder = MimRefinerModel(config)
    check_shapes(found.name, layout, placement, encoder.state_dict())

    # copies, no views of a mapped file
    dtype = _dtype_of(found.name, placement.tensors)
    weights = {}
    for name, tensor in placement.tensors.items():
        weights[name] = tensor.to(dtype, copy=True).contiguous()
    encoder.load_state_dict(weights, assign=True)
    encoder.train(False)

    own = for_channels(layout.preprocessing(found.contents), config.num_channels)
    preprocessing = {**own, **found.preprocessing}
    total = len(encoder.state_dict())
    report = LoadReport(layout.family, len(weights), total, placement.dropped, recognised_by)
    processor = image_processor(config, preprocessing)
    vars(encoder).update(load_report=report, image_processor=processor, licence=found.licence)
    logger.info("%s: %s (recognised by %s)", found.name, report, recognised_by)
    return encoder


def _refuse_newer(found: Source) -> None:
    try:
        refuse_newer_format(found.config.get("format_version"))
    except ConfigurationError as error:
        raise CheckpointError(f"{found.name}: {error}") from error


def _equipped(encoder: MimRefinerModel) -> MimRefinerModel:
    """An encoder of ours with what `load_encoder` attaches, as far as it has not got it."""
    if "image_processor" not in vars(encoder):
        stated = saved_preprocessing(encoder.config.name_or_path or "")
        vars(encoder)["image_processor"] = image_processor(encoder.config, stated)
    if "licence" not in vars(encoder):
        vars(encoder)["licence"] = saved_licence(encoder.config.name_or_path or "")
    if "load_report" not in vars(encoder):
        total = len(encoder.state_dict())
        vars(encoder)["load_report"] = LoadReport("mim_refiner", total, total, {}, "its class")
    return encoder.train(False)


# --- recognise -----------------------------------------------------------------------------------


def _state_dict_of(layout: Layout, contents: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The first of the layout's paths that is in this container, and the tensors under it."""
    for path in layout.paths:
        inner: Any = contents
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return ".".join(path), dict(named_tensors(inner))
    return "", {}


def _recognise(found: Source, family: str | None) -> tuple[Layout, dict[str, Tensor], str]:
    """The layout of this source, its state dict, and the sign by which it was recognised.

    The sign is the `family` asked for, else the `model_type`, else tensors of the file.
    """
    found = replace(found, contents=without_wrappers(found.contents))
    model_type = found.config.get("model_type")
    kind = stated("ctor_kwargs", "kind")(found.contents)
    if model_type is None and any(kind in layout.model_types for layout in LAYOUTS):
        model_type = kind

    for layout in LAYOUTS:
        where, tensors = _state_dict_of(layout, found.contents)
        sign = ""
        if family is not None:
            if layout.family == family:
                sign = f"family={family!r}"
        elif model_type is not None:
            if model_type in layout.model_types:
                sign = f"model_type={model_type!r}"
        else:
            carriers = layout.recognises(list(tensors))
            sign = ", ".join(f"{name} {list(tensors[name].shape)}" for name in carriers)

        if sign and family is None and model_type is None and not layout.reads_student:
            teacher = teacher_beside(found.name, found.contents, where)
            if teacher is not None:
                return _recognise_inside(found, teacher)
        if sign:
            kept = [name for name in tensors if layout.reason_to_drop(name) is None]
            _refuse_classifier(found.name, kept)
            if where:
                sign += f" under {where!r}"
            return layout, tensors, sign

    if family is None and model_type is None:
        inner = inner_encoder(found.name, found.contents)
        # with the same names there is nothing else to see in it
        if inner is not None and inner.contents.keys() != found.contents.keys():
            return _recognise_inside(found, inner)
    raise _unknown_family(found.name, found.contents, family, model_type)


def _recognise_inside(found: Source, inner: InnerEncoder) -> tuple[Layout, dict[str, Tensor], str]:
    """`_recognise` of an encoder below a prefix; what lies outside is said."""
    layout, tensors, sign = _recognise(replace(found, contents=inner.contents), None)
    inner.tell_of_the_rest(found.name)
    return layout, tensors, f"{sign} under {inner.prefix.removesuffix('.')!r}"


def _refuse_classifier(source: str, names: list[str]) -> None:
    """CheckpointError where tensors that the family does not expect are a classifier's."""
    heads = [name for name in names if re.fullmatch(CLASSIFIER, name)]
    if heads:
        raise CheckpointError(
            f"{source} is a fine-tuned classifier ({listed(heads)}), not a pre-trained encoder: "
            "load the checkpoint it was fine-tuned from, or save its encoder alone; of a class of "
            "transformers, AutoModel.from_pretrained(this).save_pretrained(folder) does"
        )


def _unknown_family(
    name: str, contents: Mapping[str, Any], family: str | None, model_type: str | None
) -> CheckpointError:
    """The error for a source that no layout recognises: what it has, and what would be known."""
    if family is not None:
        families = ", ".join(layout.family for layout in LAYOUTS)
        return CheckpointError(f"family={family!r} is unknown; allowed: {families}")
    if model_type is not None:
        known = ", ".join(", ".join(layout.model_types) for layout in LAYOUTS if layout.model_types)
        problem = f"model_type={brief(model_type)}, not a plain ViT known here ({known})"
        reason = why_not(str(model_type))
        if reason:
            problem += f": {reason}"
        return CheckpointError(f"{name} has {problem}; give one of these")

    tensors = dict(named_tensors(contents))
    _refuse_classifier(name, list(tensors))
    if tensors and all(re.search(DECODER, key) for key in tensors):
        return CheckpointError(
            f"{name} holds a decoder only ({listed(list(tensors))}), no encoder; load the full "
            "checkpoint"
        )

    hint = "if it is one of them, pass family="
    if any("embeddings.patch_embeddings" in key for key in tensors):
        hint = "transformers' weights need the config.json beside them: give their folder"
    keys = listed([str(key) for key in contents])
    shapes = listed([f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()]) or "none"
    titles = ", ".join(layout.title for layout in LAYOUTS)
    return CheckpointError(
        f"{name} is of no known family; top-level keys: {keys}; tensors: {shapes}; known: {titles};"
        f" {hint}"
    )


# --- configure and check -------------------------------------------------------------------------


def _settle(
    found: Source, placed: dict[str, Tensor], asked: int | Sequence[int] | None
) -> Size | None:
    """Positions for a grid of the size that is stated somewhere, which is returned; in place."""
    size = as_size(asked)
    kernel = placed.get(KERNEL)
    patch = kernel.shape[-1] if kernel is not None and kernel.ndim == 4 else 1
    allowed = size and all(side % max(patch, 1) == 0 for side in size) and max(size) <= LARGEST_SIDE

    if asked is not None and not allowed:
        raise CheckpointError(
            f"{setting('image_size')} {brief(asked)} is no size for {found.name}; give one side, "
            "or height and width, in whole pixels, multiples of the patch size "
            f"{patch} up to {LARGEST_SIDE}"
        )

    args = stated("args", "input_size")(found.contents)
    size = size or as_size(found.config.get("image_size")) or as_size(args)
    return settle_positions(found.name, placed, size, asked is not None)


def _read_config(
    found: Source,
    layout: Layout,
    placed: Mapping[str, Tensor],
    num_heads: int | None,
    size: Size | None,
) -> MimRefinerConfig:
    """The configuration: what shapes tell, what the family fixes, above both what is stated."""
    states = _stated_fields(found, layout, size)
    from_shapes = read_shapes(found.name, placed)
    _check_stated(found, layout, placed, from_shapes, states)
    fields = from_shapes | layout.settings | states
    if not fields["position_encoding"]:
        raise CheckpointError(
            f"{found.name}: {POSITIONS} is missing, and there is no {BIAS_TABLE} either"
        )
    # rotary positions have no native size, and of misshapen ones `check_shapes` will speak
    patch = from_shapes["patch_size"]
    fields.setdefault("image_size", max(224 // patch, 1) * patch)

    if num_heads is not None:
        if states.get("num_attention_heads", num_heads) != num_heads:
            raise CheckpointError(
                f"num_heads={num_heads}, but {found.name} states "
                f"{brief(states['num_attention_heads'])}; leave it out"
            )
        fields["num_attention_heads"] = num_heads
    if fields["num_attention_heads"] is None:
        raise CheckpointError(
            f"{found.name} does not state its number of attention heads, and its width "
            f"{brief(fields['hidden_size'])} is none of the published ones "
            f"({', '.join(map(str, HEADS_OF_WIDTH))}); pass num_heads="
        )

    # what a stranger states is of any type still
    unchecked: Mapping[str, Any] = fields
    try:
        config = MimRefinerConfig(**unchecked)
    except ConfigurationError as error:
        raise CheckpointError(
            f"{found.name} describes an encoder that cannot be built: {error}; get its config.json "
            "again, or correct it"
        ) from error
    config.name_or_path = found.name
    return config


def _stated_fields(found: Source, layout: Layout, size: Size | None) -> EncoderFields:
    """What the source itself, and the size that is settled, say of the fields."""
    states = {}
    for name, value in found.config.items():
        # what begins with an underline is what transformers makes of others
        if name in MimRefinerConfig.__annotations__ and not name.startswith("_"):
            states[name] = value
    for name, read in layout.facts.items():
        states[name] = read(found.config or found.contents)
    known = {name: value for name, value in states.items() if value is not None}
    fields = cast(EncoderFields, known)

    # a model of ours says itself where it came from
    if layout in TRANSFORMERS_LAYOUTS:
        kind = found.config.get("model_type")
        fields["source_model_type"] = kind if kind in layout.model_types else layout.model_types[-1]
    if size is not None:
        fields["image_size"] = size[0] if size[0] == size[1] else list(size)
    return fields


def _check_stated(
    found: Source,
    layout: Layout,
    placed: Mapping[str, Tensor],
    shapes: EncoderFields,
    states: EncoderFields,
) -> None:
    """CheckpointError where the weights are not what is stated, which becomes whole; in place."""
    check_sizes(found.name, shapes, states)
    if found.config:
        check_claims(found.name, layout.claims, found.config, placed, shapes)

    size = as_size(states.get("image_size"))
    # a model of ours says itself whether it cuts images, and others do
    if size and found.config.get("model_type") != MimRefinerConfig.model_type:
        states["cut_to_patches"] = any(side % shapes["patch_size"] for side in size)
        check_stated_size(found.name, placed, size, shapes)


def _dtype_of(name: str, placed: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the file, or float32 where tokens with their positions have no other."""
    dtype = placed[KERNEL].dtype
    if all(tensor.dtype == dtype for tensor in placed.values()):
        return dtype
    logger.warning(
        "%s: in %s, the sums of its tokens and their positions would be rounded; read as float32",
        name,
        str(dtype).removeprefix("torch."),
    )
    return torch.float32

"""What a `config.json` of transformers claims of the weights beside it, and whether they agree.

    check_claims("out/model", layout.claims, config, placed, read_shapes("out/model", placed))

A claim is compared with what the tensors tell. Where they are of another size, or lack what is
claimed, config.json and weights are of two models, or something is lost: that is refused. Where
they hold more (biases, a layer scale, a norm), they were trained with it: the weights are taken,
and one line says so.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..model.configuration_mim_refiner import brief, is_number
from ..runtime.files import CheckpointError
from .layout import POSITIONS, stated
from .shapes import BIAS_TABLE

logger = logging.getLogger(__name__)

Reader = Callable[[Mapping[str, Any]], Any]
"""What a `config.json` says of one thing; None where it says nothing."""

_Q, _K, _V, _OUT = (rf"layers\.\d+\.attention\.{name}_proj\.bias" for name in "qkvo")
# claims of what is there or not, with the tensors that tell
_PRESENT = {
    "query_bias": _Q,
    "key_bias": _K,
    "value_bias": _V,
    "proj_bias": _OUT,
    "mlp_bias": r"layers\.\d+\.mlp\.fc1\.bias",
    "layer_scale": r"layers\.\d+\.layer_scale1\.weight",
    "absolute_positions": re.escape(POSITIONS),
    "relative_positions": rf"layers\.\d+\.attention\.{re.escape(BIAS_TABLE)}",
    "shared_relative_positions": re.escape(BIAS_TABLE),
    "final_norm": r"norm\.weight",
    "pooled_norm": r"pooled_norm\.weight",
    "pooling_head": r"attention_pooling\.query",
}
# keys of a config.json that mean what is claimed, if they are not called so
_KEYS = {
    "query_bias": ("query_bias", "qkv_bias"),
    "key_bias": ("key_bias", "qkv_bias"),
    "value_bias": ("value_bias", "qkv_bias"),
    "proj_bias": ("proj_bias", "qkv_bias"),
    "layer_scale": ("layer_scale_init_value",),
    "absolute_positions": ("use_absolute_position_embeddings",),
    "relative_positions": ("use_relative_position_bias",),
    "shared_relative_positions": ("use_shared_relative_position_bias",),
    "final_norm": ("use_mean_pooling",),
    "pooled_norm": ("use_mean_pooling",),
    "pooling_head": ("vision_use_head", "use_head"),
    "gated_mlp": ("use_swiglu_ffn", "use_gated_mlp"),
    "intermediate_size": ("mlp_ratio",),
    "num_register_tokens": ("num_register_tokens", "n_cls_tokens"),
    "image_size": ("num_patches",),
}


def check_claims(
    name: str,
    claims: Mapping[str, Reader],
    config: Mapping[str, Any],
    placed: Mapping[str, Tensor],
    shapes: Mapping[str, object],
) -> None:
    """Compare a configuration with the weights, which win where they hold more than it says.

    Args:
        name: of the source, for messages.
        claims: keys of `_PRESENT`, or fields that shapes tell, with what the configuration says.
        placed: the tensors under our names.
        shapes: what they tell (`read_shapes`).

    Raises:
        CheckpointError: for weights of another size, or without something that is claimed.
    """
    names = "\n".join(placed)
    taken: dict[str, list[str]] = {}
    for claim, read in claims.items():
        said = read(config)
        held = shapes.get(claim)
        is_presence = claim in _PRESENT
        if is_presence:
            held = re.search(rf"^{_PRESENT[claim]}$", names, re.MULTILINE) is not None
        if said is None or said == held:
            continue

        # what is said without any key, the family says
        keys = () if read({}) is not None else _KEYS.get(claim, (claim,))
        key = next((key for key in keys if key in config), "model_type")
        words = f"{name} states {key}={brief(config.get(key))}, but its weights have"
        if is_presence and held:
            taken.setdefault(words, []).append(_in_words(claim, held))
            continue
        raise CheckpointError(
            f"{words} {_in_words(claim, held)}; correct its configuration, or get it again with "
            "its weights"
        )
    for words, what in taken.items():
        logger.warning("%s %s: the weights are taken", words, ", ".join(what))


def _in_words(claim: str, held: Any) -> str:
    """What the weights have: `query bias`, `no layer scale`, `intermediate_size=48`."""
    if claim not in _PRESENT:
        return f"{claim}={held}"
    what = claim.replace("_", " ")
    return what if held else f"no {what}"


def check_sizes(name: str, held: Mapping[str, object], states: Mapping[str, object]) -> None:
    """CheckpointError where the weights are of another size than is stated: none is built."""
    for field_name in ("num_hidden_layers", "predictor_layers", "hidden_size"):
        count = states.get(field_name)
        if not isinstance(count, int) or count == held[field_name]:
            continue
        blocks = " such blocks" if field_name != "hidden_size" else ""
        raise CheckpointError(
            f"{name} states {field_name}={brief(count)}, but its weights have "
            f"{held[field_name]}{blocks}; get its config.json and its weights again"
        )


# --- readers --------------------------------------------------------------------------------------


def always(value: Any) -> Reader:
    """What a family says without a key of its own."""
    return lambda config: value


def width_by_ratio(config: Mapping[str, Any]) -> int | None:
    """The width of the MLP that DINOv2 and Pixio make of `mlp_ratio`."""
    width: Any = config.get("hidden_size")
    ratio: Any = config.get("mlp_ratio")
    if ratio is None:
        return None
    # of which no width can be made
    if not is_number(width, 1, 2**16) or not is_number(ratio, 0.0, 2.0**10):
        return 0
    inner = int(width * ratio)
    # a gated one is two thirds as wide, in multiples of 8
    return (int(inner * 2 / 3) + 7) // 8 * 8 if config.get("use_swiglu_ffn") else inner


def more_class_tokens(config: Mapping[str, Any]) -> int | None:
    """How many class tokens Pixio has beyond the first."""
    count = config.get("n_cls_tokens")
    return count - 1 if isinstance(count, int) else None


def size_by_patches(config: Mapping[str, Any]) -> Any:
    """The size of images for which SigLIP 2 states the number of patches, a square's."""
    count = config.get("num_patches")
    patch = config.get("patch_size")
    if not isinstance(count, int) or not isinstance(patch, int):
        return None
    side = math.isqrt(max(count, 0))
    return side * patch if side**2 == count else [count * patch, patch]


def beit_layer_scale(config: Mapping[str, Any]) -> bool | None:
    """Whether BEiT has a layer scale; 0 is its word for none."""
    value = config.get("layer_scale_init_value")
    return value > 0 if isinstance(value, int | float) else None


def beit_final_norm(config: Mapping[str, Any]) -> bool | None:
    """Whether BEiT's tokens end in a norm, of which mean pooling is the switch.

    Its class for masked images has one of its own behind the encoder.
    """
    mean = config.get("use_mean_pooling")
    classes = config.get("architectures")
    bare = ("BeitModel", "Data2VecVisionModel")
    is_bare = isinstance(classes, list) and any(kind in bare for kind in classes)
    return not mean if is_bare and isinstance(mean, bool) else None


def beit_pooled_norm(config: Mapping[str, Any]) -> bool | None:
    """False where BEiT pools CLS; with the mean not every class of it has the norm."""
    return False if config.get("use_mean_pooling") is False else None


_BIASES: dict[str, Reader] = {
    "query_bias": stated("qkv_bias"),
    "key_bias": stated("qkv_bias"),
    "value_bias": stated("qkv_bias"),
    "proj_bias": always(True),
    "mlp_bias": always(True),
}
OF_PLAIN_BLOCKS: dict[str, Reader] = {
    **_BIASES,
    "gated_mlp": always(False),
    "layer_scale": always(False),
    "num_register_tokens": always(0),
}
"""What most classes say: a plain MLP, no layer scale, and no tokens but CLS and patches."""
OF_BEIT: dict[str, Reader] = {
    "absolute_positions": stated("use_absolute_position_embeddings"),
    "relative_positions": stated("use_relative_position_bias"),
    "shared_relative_positions": stated("use_shared_relative_position_bias"),
    "layer_scale": beit_layer_scale,
    "final_norm": beit_final_norm,
    "pooled_norm": beit_pooled_norm,
    "query_bias": always(True),
    "key_bias": always(False),
    "value_bias": always(True),
}
OF_DINOV2: dict[str, Reader] = {
    **OF_PLAIN_BLOCKS,
    "gated_mlp": stated("use_swiglu_ffn"),
    "intermediate_size": width_by_ratio,
    "layer_scale": always(True),
}
OF_DINOV3: dict[str, Reader] = {
    **{name: stated(name) for name in _BIASES},
    "gated_mlp": stated("use_gated_mlp"),
    "layer_scale": always(True),
    "num_register_tokens": stated("num_register_tokens"),
}
OF_PIXIO: dict[str, Reader] = {
    **OF_PLAIN_BLOCKS,
    "intermediate_size": width_by_ratio,
    "num_register_tokens": more_class_tokens,
}
OF_AIMV2: dict[str, Reader] = {
    **OF_PLAIN_BLOCKS,
    "gated_mlp": always(True),
    "proj_bias": stated("qkv_bias"),
    "mlp_bias": stated("mlp_bias"),
    "pooling_head": stated("use_head"),
}

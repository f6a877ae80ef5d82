"""The encoder's configuration: one plain ViT that covers every masked-image-modeling family.

What differs between MAE, data2vec 2.0, BEiT and their relatives is a setting here and nothing else:

| family                                   | norm_placement | position_encoding             | bias   | final_norm |
|------------------------------------------|----------------|-------------------------------|--------|------------|
| MAE, dBOT, MAWS, DINO, iBOT, ViT         | pre            | absolute                      | all    | yes        |
| CrossMAE                                 | pre            | absolute                      | all    | no         |
| data2vec 2.0 (and D2V2-Refined)          | post           | absolute, with embedding_norm | all    | no         |
| BEiT, ConMIM, data2vec-vision            | pre            | relative or shared_relative   | no_key | depends    |
| CAPI (rmsnorm, registers, predictor)     | pre            | rope                          | none   | no weight  |

This file travels with every saved model (`trust_remote_code=True`), so it imports nothing of the package.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

ABSOLUTE, RELATIVE, SHARED_RELATIVE, ROPE = "absolute", "relative", "shared_relative", "rope"

Pooling = Literal["cls", "mean", "register", "global_repr"]
"""How tokens become one vector per image; see `MimRefinerConfig.pooling`."""


@strict
class MimRefinerConfig(BackboneConfigMixin, PreTrainedConfig):
    """Shape and style of a `MimRefinerModel`; the defaults are MAE's ViT-B/16.

    Args:
        hidden_size: width D of the tokens.
        num_hidden_layers: number of transformer blocks L.
        num_attention_heads: attention heads per block; must divide `hidden_size`.
        intermediate_size: width of the MLP's hidden layer.
        hidden_act: activation of the MLP (exact GELU in every family).
        layer_norm_eps: epsilon of every norm (1e-6 in the original checkpoints; transformers' own configs often say 1e-12).
        initializer_range: standard deviation of freshly drawn weights.
        image_size: pixels of the native input, an int or (height, width). Other sizes need `interpolate_pos_encoding=True`.
        patch_size: side of a square patch in pixels; must divide `image_size`.
        num_channels: channels of the input image.
        norm_placement: "pre" (`x + f(norm(x))`, MAE) or "post" (`norm(x + f(x))`, data2vec 2.0).
        norm_type: of every norm, "layernorm" or "rmsnorm" (CAPI).
        position_encoding: "absolute" (a table added to the patches), "relative" (a bias table per block), "shared_relative"
            (one for all blocks), "absolute+relative", "absolute+shared_relative", or "rope" (CAPI: queries and keys turned by
            frequencies stored per block; it takes images of any size).
        bias: "all" linear layers have a bias, "no_key" (BEiT: all but the key projection), or "none" (CAPI).
        layer_scale_init: start value of the learned per-channel scale of each residual branch; None for no layer scale.
        use_cls_token: whether a CLS token stands in front. Its position, if the family has one, is folded into it.
        num_register_tokens: learned tokens after CLS. They carry no position, but for rope, where they sit on the border of
            the image (CAPI) and their number must be a multiple of 4.
        embedding_norm: a norm over CLS and patches before the first block (data2vec 2.0).
        final_norm: a norm after the last block.
        final_norm_affine: whether that norm (and the predictor's) has weights; CAPI's has none.
        predictor_layers: cross-attention blocks kept of CAPI's predictor, for `pooling="global_repr"`; 0 for no predictor.
        pooling: what `pooler_output` is: "cls", "mean" of the patch tokens, the first "register", or "global_repr": the mean
            of what the predictor reads out of the encoder's output at every patch. None: CLS where there is one, else mean.
        features: "output" pools the encoder's output, "last_block" the raw output of the last block WITHOUT the final norm,
            as the paper evaluates (MIM-Refiner, Sec. 5.2).

    Raises:
        StrictDataclassError (huggingface_hub): for a setting that is not allowed or contradicts another; it names field and value.
    """

    model_type = "mim_refiner"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    norm_placement: Literal["pre", "post"] = "pre"
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    position_encoding: str = ABSOLUTE
    bias: Literal["all", "no_key", "none"] = "all"
    layer_scale_init: float | int | None = None
    use_cls_token: bool = True
    num_register_tokens: int = 0
    embedding_norm: bool = False
    final_norm: bool = True
    final_norm_affine: bool = True
    predictor_layers: int = 0
    pooling: Pooling | None = None
    features: Literal["output", "last_block"] = "output"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pooling is None:
            self.pooling = "cls" if self.use_cls_token else "mean"
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Cross-field checks, run at construction by `@strict`."""
        positions = (ABSOLUTE, RELATIVE, SHARED_RELATIVE, f"{ABSOLUTE}+{RELATIVE}", f"{ABSOLUTE}+{SHARED_RELATIVE}", ROPE)
        if self.position_encoding not in positions:
            raise ValueError(f"position_encoding={self.position_encoding!r} is not supported; allowed: {', '.join(positions)}")
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "patch_size",
            "num_channels",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_register_tokens", "predictor_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}")
        if any(size < self.patch_size or size % self.patch_size for size in self.image_hw):
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")

    def validate_rope(self) -> None:
        """What rotary positions and the predictor, which has no other kind, ask of the other fields."""
        if self.position_encoding != ROPE:
            if self.predictor_layers:
                raise ValueError(f"predictor_layers={self.predictor_layers} needs position_encoding='rope'")
            return
        if self.use_cls_token:
            raise ValueError("position_encoding='rope' needs use_cls_token=False: a CLS token has no place in the image")
        if self.num_register_tokens % 4:
            raise ValueError(
                f"num_register_tokens={self.num_register_tokens} must be a multiple of 4 with position_encoding='rope': "
                "they sit on the four edges of the image"
            )
        if self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                f"position_encoding='rope' needs heads whose width is a multiple of 4; hidden_size={self.hidden_size} and "
                f"num_attention_heads={self.num_attention_heads} make it {self.hidden_size // self.num_attention_heads}"
            )

    def validate_pooling(self) -> None:
        """`pooling` must read something that this encoder has."""
        if self.pooling is not None and (missing := self.missing_for(self.pooling)):
            raise ValueError(f"pooling={self.pooling!r}: the encoder has {missing}; use pooling='mean'")
        if self.pooling == "global_repr" and self.features == "last_block":
            raise ValueError("pooling='global_repr' reads the encoder's output; use features='output' with it")

    def missing_for(self, pooling: Pooling) -> str | None:
        """What `pooling` would read and this encoder has not got, in words with the field that gives it; None if it can."""
        lacks = {
            "cls": None if self.use_cls_token else "no CLS token (use_cls_token=False)",
            "register": None if self.num_register_tokens else "no register tokens (num_register_tokens=0)",
            "global_repr": None if self.predictor_layers else "no predictor (predictor_layers=0)",
        }
        return lacks.get(pooling)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Native (height, width) of the input in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Native number of patches (rows, columns)."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: CLS and registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def has_absolute_positions(self) -> bool:
        """Whether a position table is added to the patch tokens."""
        return self.position_encoding.startswith(ABSOLUTE)

    @property
    def relative_positions(self) -> Literal["none", "relative", "shared_relative"]:
        """Which relative position bias the attention has, if any."""
        last = self.position_encoding.split("+")[-1]
        if last == RELATIVE:
            return "relative"
        return "shared_relative" if last == SHARED_RELATIVE else "none"


__all__ = ["MimRefinerConfig", "Pooling"]

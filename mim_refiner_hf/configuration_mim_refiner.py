"""The encoder's configuration: one plain ViT that covers every masked-image-modeling family.

What differs between MAE, data2vec 2.0, BEiT and their relatives is a setting here and nothing else:

| family                                   | norm_placement | position_encoding             | bias   | final_norm |
|------------------------------------------|----------------|-------------------------------|--------|------------|
| MAE, dBOT, MAWS, DINO, iBOT, ViT         | pre            | absolute                      | all    | yes        |
| CrossMAE                                 | pre            | absolute                      | all    | no         |
| data2vec 2.0 (and D2V2-Refined)          | post           | absolute, with embedding_norm | all    | no         |
| BEiT, ConMIM, data2vec-vision            | pre            | relative or shared_relative   | no_key | depends    |

This file travels with every saved model (`trust_remote_code=True`), so it imports nothing of the package.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

ABSOLUTE, RELATIVE, SHARED_RELATIVE = "absolute", "relative", "shared_relative"


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
        norm_type: "layernorm". ("rmsnorm", CAPI's, is reserved.)
        position_encoding: "absolute" (a table added to the patches), "relative" (a bias table per block), "shared_relative"
            (one for all blocks), or "absolute+relative", "absolute+shared_relative". ("rope", CAPI's, is reserved.)
        bias: "all" linear layers have a bias, "no_key" (BEiT: all but the key projection), or "none" (CAPI).
        layer_scale_init: start value of the learned per-channel scale of each residual branch; None for no layer scale.
        use_cls_token: whether a CLS token stands in front. Its position, if the family has one, is folded into it.
        num_register_tokens: learned tokens after CLS that carry no position (DINOv2-style registers).
        embedding_norm: a norm over CLS and patches before the first block (data2vec 2.0).
        final_norm: a norm after the last block.
        pooling: what `pooler_output` is: "cls", or "mean" of the patch tokens. None: CLS where there is one, else mean.
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
    norm_type: str = "layernorm"
    position_encoding: str = ABSOLUTE
    bias: Literal["all", "no_key", "none"] = "all"
    layer_scale_init: float | int | None = None
    use_cls_token: bool = True
    num_register_tokens: int = 0
    embedding_norm: bool = False
    final_norm: bool = True
    pooling: Literal["cls", "mean"] | None = None
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
        positions = (ABSOLUTE, RELATIVE, SHARED_RELATIVE, f"{ABSOLUTE}+{RELATIVE}", f"{ABSOLUTE}+{SHARED_RELATIVE}")
        if self.position_encoding not in positions:
            raise ValueError(
                f"position_encoding={self.position_encoding!r} is not supported; allowed: {', '.join(positions)} "
                "('rope' is reserved for CAPI)"
            )
        if self.norm_type != "layernorm":
            raise ValueError(
                f"norm_type={self.norm_type!r} is not supported; allowed: layernorm ('rmsnorm' is reserved for CAPI)"
            )
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
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens={self.num_register_tokens} must not be negative")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}")
        if any(size < self.patch_size or size % self.patch_size for size in self.image_hw):
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError("pooling='cls' needs use_cls_token=True; without a CLS token use pooling='mean'")

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


__all__ = ["MimRefinerConfig"]

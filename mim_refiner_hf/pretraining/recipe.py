"""The recipe of a pre-training: every setting that decides what is computed, typed and checked.

    PretrainRecipe(image_size=32, patch_size=4, hidden_size=192)          # MAE
    PretrainRecipe(objective="data2vec2", epochs=100)

One flat class: what several methods read stands here, what only one reads in a small class of its
own (`data2vec2_fields.py`). Settings whose default depends on the method are None until the recipe
is made; `DEFAULTS` has the authors' numbers for a ViT-B/16. A setting that the method does not read
is refused where it is stated.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from ..runtime.settings import (
    Allowed,
    Depth,
    NonNegativeFloat,
    PositiveInt,
    Rate,
    Seed,
    Share,
    ShareAboveZero,
    Width,
    between,
    check_fields,
    documented,
)
from ..runtime.wording import setting
from .capi_fields import CapiFields
from .conmim_fields import ConmimFields
from .data2vec2_fields import Data2vec2Fields

if TYPE_CHECKING:
    from ..model.configuration_mim_refiner import MimRefinerConfig

# the configuration's, which comes with torch
_LARGEST_SIDE = 8192
# at most so much of the epochs that are stated is warm-up, where it is not stated and the authors'
# own share is no larger
_WARMUP_SHARE = 0.1
MaskRatio = Annotated[float, Allowed("between 0 and 1, both excluded", lambda ratio: 0 < ratio < 1)]

DEFAULTS: dict[str, dict[str, float]] = {
    "mae": {
        "mask_ratio": 0.75,
        "scale": 0.2,
        "decoder_size": 512,
        "decoder_layers": 8,
        "epochs": 800,
        "warmup_epochs": 40.0,
        "batch_size": 4096,
        "learning_rate": 1.5e-4,
        "end_learning_rate": 1e-6,
        "weight_decay": 0.05,
        "clip_norm": 0.0,
    },
    "data2vec2": {
        "mask_ratio": 0.8,
        "scale": 0.2,
        "decoder_size": 768,
        "decoder_layers": 6,
        "epochs": 150,
        "warmup_epochs": 20.0,
        "batch_size": 512,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "clip_norm": 4.0,
        "momentum_start": 0.9998,
        "momentum_end": 0.99999,
    },
    "conmim": {
        "mask_ratio": 0.75,
        "scale": 0.08,
        "epochs": 300,
        "warmup_epochs": 5.0,
        "batch_size": 2048,
        "learning_rate": 5e-4,
        "end_learning_rate": 1e-5,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "momentum_start": 0.996,
        "momentum_end": 1.0,
    },
    "capi": {
        "mask_ratio": 0.65,
        "scale": 0.6,
        "epochs": 500,
        "warmup_epochs": 50.0,
        "batch_size": 16384,
        "learning_rate": 1e-3,
        "end_learning_rate": 0.0,
        "weight_decay": 0.1,
        "clip_norm": 0.0,
        "momentum_start": 1.0,
        "momentum_after_warmup": 0.999,
        "momentum_end": 1.0,
        "clustering_learning_rate": 5e-4,
    },
}
"""By method: the shared settings that it reads, with the authors' numbers for a ViT-B/16."""

# what the encoder of a method has that is not the configuration's default, MAE's
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mae": {},
    "data2vec2": {"norm_placement": "post", "embedding_norm": True, "final_norm": False},
    # no loss reads CLS, and the authors fine-tune the mean of the patches
    "conmim": {"position_encoding": "shared_relative", "bias": "no_key", "pooling": "mean"},
    "capi": {
        "norm_type": "rmsnorm",
        "layer_norm_eps": 1e-5,
        "position_encoding": "rope",
        "bias": "none",
        "use_cls_token": False,
        "final_norm_affine": False,
    },
}


class PretrainSteps(NamedTuple):
    """Updates of a pre-training: of an epoch, of the warm-up, and all."""

    per_epoch: int
    warmup: int
    total: int


@dataclass
class MaeFields:
    """Fields of MAE (arXiv 2111.06377) alone."""

    decoder_attention_heads: Width = documented(
        16, "mae: attention heads per block of the decoder."
    )
    crops_per_image: Depth = documented(
        1, "mae: crops of every image in a step (MAE-CT: 2); a batch_size counts images."
    )


# the classes of settings that one method alone reads
_OWN_FIELDS: dict[str, type] = {
    "mae": MaeFields,
    "data2vec2": Data2vec2Fields,
    "conmim": ConmimFields,
    "capi": CapiFields,
}


@dataclass
class PretrainRecipe(CapiFields, ConmimFields, Data2vec2Fields, MaeFields):
    """Method, shape of the encoder and training; the defaults are the authors' for a ViT-B/16.

    Raises:
        ValueError: at construction, in one line: which flag, which value, what is allowed.
    """

    recipe_prefix: ClassVar[str] = "pretrain-"

    objective: Literal["mae", "data2vec2", "conmim", "capi"] = documented(
        "mae",
        "Method: mae (pixels of masked patches), data2vec2 (features of a momentum copy), conmim "
        "(which patch of the image it is), or capi (the cluster of its features).",
    )
    # ---- encoder
    image_size: Annotated[int, between(1, _LARGEST_SIDE)] = documented(
        224, "Side of the square input in pixels."
    )
    patch_size: Depth = documented(16, "Side of a patch; must divide image_size.")
    num_channels: Depth = documented(3, "3 for RGB, 1 for greyscale, 1 to 16 of arrays.")
    hidden_size: Width = documented(768, "Width of the encoder; its MLPs are 4 times as wide.")
    num_hidden_layers: Depth = documented(12, "Blocks of the encoder.")
    num_attention_heads: Width = documented(
        12, "Attention heads per block; must divide hidden_size."
    )
    pooling: Literal["cls", "mean"] | None = documented(
        None,
        "What the encoder's vector is: the CLS token, or the mean of the patches. Default: mae "
        "and data2vec2 cls, conmim and capi mean.",
    )
    # ---- method
    mask_ratio: MaskRatio = documented(
        None,
        "Share of the patches taken away. Default: mae 0.75, data2vec2 0.8, conmim 0.75, capi "
        "0.65.",
    )
    decoder_size: Width = documented(
        None, "Width of the decoder, which is thrown away. Default: mae 512, data2vec2 768."
    )
    decoder_layers: Depth = documented(None, "Blocks of the decoder. Default: mae 8, data2vec2 6.")
    momentum_start: Share = documented(
        None,
        "Momentum of the teacher's copy at first. Default: data2vec2 0.9998, conmim 0.996, capi "
        "1 (and momentum_after_warmup later).",
    )
    momentum_end: Share = documented(
        None,
        "Momentum of the teacher's copy at last. Default: data2vec2 0.99999, conmim and capi 1.",
    )
    # ---- crops
    scale: ShareAboveZero = documented(
        None,
        "Smallest share of the image's area in a crop. Default: mae and data2vec2 0.2, conmim "
        "0.08, capi 0.6.",
    )
    flip: Share = documented(0.5, "Probability of a horizontal flip.")
    # ---- training
    epochs: PositiveInt = documented(
        None, "Epochs. Default: mae 800, data2vec2 150, conmim 300, capi 500."
    )
    max_steps: PositiveInt | None = documented(None, "Updates at most; the schedule ends there.")
    warmup_epochs: NonNegativeFloat = documented(
        None,
        "Epochs of linear learning-rate warm-up. Default: mae 40, data2vec2 20, conmim 5, capi 50; "
        "where epochs are stated, at most a tenth of them (data2vec2: 2/15).",
    )
    batch_size: PositiveInt = documented(
        None,
        "Images per update, all processes together. Default: mae 4096, data2vec2 512, conmim "
        "2048, capi 16384.",
    )
    learning_rate: Rate = documented(
        None,
        "mae: base learning rate, times batch_size * crops_per_image / 256, default 1.5e-4. "
        "Others: the peak itself; default data2vec2 and capi 1e-3, conmim 5e-4.",
    )
    end_learning_rate: NonNegativeFloat = documented(
        None, "Where the cosine of the learning rate leads. Default: mae 1e-6, conmim 1e-5, capi 0."
    )
    weight_decay: NonNegativeFloat = documented(None, "Weight decay. Default: 0.05, capi 0.1.")
    clip_norm: NonNegativeFloat = documented(
        None,
        "Gradients are clipped to this norm; 0 for never. Default: mae 0, data2vec2 4, "
        "conmim 1, capi 0.",
    )
    seed: Seed = documented(0, "Weights, order, crops and masks are pure functions of it.")

    def __post_init__(self) -> None:
        self._fill()
        check_fields(self)
        for problem in self._problems():
            raise ValueError(problem)
        # contradictions of the encoder's own fields
        self.encoder_config()

    def _fill(self) -> None:
        """Put the method's numbers in the place of what is left open; refuse what it cannot use."""
        own = DEFAULTS.get(self.objective)
        if own is None:
            # check_fields says so
            return
        self.left_open = [name for name in own if getattr(self, name) is None]
        if self.warmup_epochs is None and self.epochs is not None:
            # of a training that is not as long as the authors'
            warmup = own["warmup_epochs"]
            share = max(_WARMUP_SHARE, warmup / own["epochs"])
            own = {**own, "warmup_epochs": min(round(share * self.epochs, 3), warmup)}
        unread: dict[str, Any] = {}
        for objective, kind in _OWN_FIELDS.items():
            if objective != self.objective:
                unread |= {field.name: field.default for field in dataclasses.fields(kind)}
        for table in DEFAULTS.values():
            unread |= {name: value for name, value in table.items() if name not in own}

        for name, value in unread.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"{setting(name, getattr(self, name))}: is not read with "
                    f"{setting('objective', self.objective)}; leave it out"
                )
        for name, value in {**unread, **own}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _problems(self) -> Iterator[str]:
        """What contradicts what."""
        if self.warmup_epochs >= self.epochs:
            yield (
                f"{setting('warmup_epochs', self.warmup_epochs)}: must be less than "
                f"{setting('epochs', self.epochs)}"
            )
        yield from self._problems_of_shape()
        if self.objective == "mae":
            yield from self._problems_of_mae()
        if self.objective == "capi":
            yield from self._problems_of_capi()
        if self.objective == "data2vec2":
            yield from self._problems_of_data2vec2()

    def _problems_of_shape(self) -> Iterator[str]:
        """Said here, though the configuration says it too: that comes with torch."""
        size = setting("image_size", self.image_size)
        patch = setting("patch_size", self.patch_size)
        if self.image_size % self.patch_size:
            near = max(self.image_size // self.patch_size, 1) * self.patch_size
            yield f"{patch}: must divide {size}; use {setting('image_size', near)}"

        heads = setting("num_attention_heads", self.num_attention_heads)
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            yield f"{heads}: must divide {setting('hidden_size', self.hidden_size)}"

    def _problems_of_mask(self) -> Iterator[str]:
        """Of methods whose student sees a share of the patches."""
        if self.num_patches == 1:
            size = setting("image_size", self.image_size)
            yield f"{setting('patch_size', self.patch_size)}: {size} is one patch; lower it"
        if self.num_visible < 1:
            yield f"{setting('mask_ratio', self.mask_ratio)}: leaves no patch visible; lower it"

    def _problems_of_mae(self) -> Iterator[str]:
        yield from self._problems_of_mask()
        if self.decoder_size % 4 or self.decoder_size % self.decoder_attention_heads:
            width = setting("decoder_size", self.decoder_size)
            yield f"{width}: must be a multiple of 4 and of {setting('decoder_attention_heads')}"

    def _problems_of_capi(self) -> Iterator[str]:
        if self.registers % 4:
            yield (
                f"{setting('registers', self.registers)}: must be a multiple of 4: they sit on the "
                "four edges of the image"
            )
        if self.pooling == "cls":
            yield f"{setting('pooling', 'cls')}: the encoder has no CLS token; leave it out"
        if self.hidden_size // self.num_attention_heads % 4:
            heads = setting("num_attention_heads", self.num_attention_heads)
            width = setting("hidden_size", self.hidden_size)
            yield f"{heads}: {width} must be that many times a multiple of 4, for rotary positions"

    def _problems_of_data2vec2(self) -> Iterator[str]:
        width = setting("decoder_size", self.decoder_size)
        groups = setting("decoder_groups", self.decoder_groups)
        if self.decoder_size % self.decoder_groups or self.hidden_size % self.decoder_groups:
            sizes = f"{width} and {setting('hidden_size', self.hidden_size)}"
            yield f"{groups}: must divide {sizes}"
        if self.target_layers > self.num_hidden_layers:
            layers = setting("num_hidden_layers", self.num_hidden_layers)
            yield f"{setting('target_layers', self.target_layers)}: must be at most {layers}"
        yield from self._problems_of_mask()

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return math.prod(self.encoder_config().grid)

    @property
    def num_visible(self) -> int:
        """Patches of an image that stay visible; in floating point, as the authors have it."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def num_centres(self) -> int:
        """data2vec2: blocks that are drawn to stay visible."""
        share = 1 - self.mask_ratio + self.mask_adjust
        return int(self.num_patches * share / self.mask_length**2)

    def encoder_config(self) -> "MimRefinerConfig":
        """Configuration of the method's encoder; MLP ratio 4."""
        # it comes with torch, which what is refused before need not wait for
        from ..model.configuration_mim_refiner import MimRefinerConfig

        return MimRefinerConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=4 * self.hidden_size,
            **self._architecture(),
        )

    def _architecture(self) -> dict[str, Any]:
        """Fields of the configuration by which the method's encoder differs from MAE's."""
        fields = dict(_ARCHITECTURES[self.objective])
        if self.pooling is not None:
            fields["pooling"] = self.pooling
        if self.objective == "conmim":
            fields["layer_scale_init"] = self.layer_scale
        if self.objective == "capi":
            fields["num_register_tokens"] = self.registers
            fields["predictor_layers"] = self.predictor_layers
        return fields

    def steps(self, num_images: int | None) -> PretrainSteps:
        """The updates of a training on so many images, None for a stream.

        Of a stream, which has no length, `max_steps` are all `epochs`.

        Raises:
            ValueError: for fewer images than a batch, and a stream without `max_steps`.
        """
        if num_images is None:
            if self.max_steps is None:
                raise ValueError(
                    f"{setting('streaming')}: a stream has no length; say with "
                    f"{setting('max_steps')} how many updates there are"
                )
            total = self.max_steps
            warmup = min(round(total * self.warmup_epochs / self.epochs), total - 1)
            return PretrainSteps(max(total // self.epochs, 1), warmup, total)

        if self.batch_size > num_images:
            raise ValueError(
                f"{setting('batch_size', self.batch_size)}: exceeds the {num_images} images; "
                "lower it"
            )

        per_epoch = num_images // self.batch_size
        total = self.epochs * per_epoch
        warmup = round(self.warmup_epochs * per_epoch)
        if self.max_steps is not None and self.max_steps < total:
            total = self.max_steps
            warmup = min(warmup, total - 1)
        return PretrainSteps(per_epoch, warmup, total)


def changed_settings(begun: Mapping[str, Any], recipe: PretrainRecipe) -> list[str]:
    """How a recipe differs from the one that a folder was begun with, by field.

    A field that was not there yet counts as having its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(PretrainRecipe)}
    changes = []
    for name, value in dataclasses.asdict(recipe).items():
        before = begun.get(name, defaults[name])
        if before != value:
            changes.append(f"{name} was {before}, is {value}")
    return changes

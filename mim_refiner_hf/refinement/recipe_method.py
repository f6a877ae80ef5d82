"""The fields of a recipe that say what is computed: heads, objective, views, schedule.

With the defaults it is MIM-Refiner (arXiv 2402.10093). What MAE-CT (arXiv 2304.10520) does in
another way has a field each; the recipes `mae-ct-*` state them all.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from ..runtime.settings import (
    Allowed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    ShareBetween,
    documented,
    minimum,
)
from .choices import Activation, HeadInit, LossSchedule, NormViews, Pairs, Swap


def _is_area_range(scale: list[float]) -> bool:
    return len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1


class TrainedPart(NamedTuple):
    """What `trainable` says: "all"; "last", so many blocks; or "lora", adapters of that rank."""

    kind: str
    number: int = 0


def trained_part(trainable: str) -> TrainedPart | None:
    """The parts of such as "last:4"; None for what says nothing."""
    if trainable == "all":
        return TrainedPart("all")
    said = re.fullmatch(r"(last|lora):([1-9]\d{0,4})", trainable)
    return TrainedPart(said[1], int(said[2])) if said else None


def default_head_blocks(num_layers: int) -> list[int]:
    """The last third of the blocks, rounded up to an even number (paper, Sec. 5.1).

    8 heads for 24 blocks, 12 for 32.
    """
    heads = min(num_layers, 2 * math.ceil(num_layers / 6))
    return list(range(num_layers - heads, num_layers))


_TRAINABLE = Allowed(
    "all, last:N or lora:R, with N blocks or a rank R of at least 1",
    lambda trainable: trained_part(trainable) is not None,
)
# their order is checked among the other contradictions
BlockNumbers = Annotated[list[int], Allowed("numbers of blocks", lambda blocks: True)]
AreaRange = Annotated[list[float], Allowed("two numbers, 0 < low <= high <= 1", _is_area_range)]


@dataclass
class MethodFields:
    """Heads, objective, views and schedule, as `RefineRecipe` has them; it also checks them."""

    # ---- heads
    head_blocks: BlockNumbers | Literal["auto"] | None = documented(
        None,
        "0-based blocks with a head, the last block meaning the encoder's output; or auto: chosen "
        "by measuring the features of all blocks on at most 2000 training images (k-NN accuracy; "
        "without labels, neighbour agreement). None: the last third.",
    )
    num_heads: PositiveInt | None = documented(
        None, "Heads on the last so many blocks, instead of head_blocks."
    )
    matryoshka: bool = documented(
        False,
        "Three more heads on the encoder's output, which see only its first eighth, quarter and "
        "half of the channels, so that a vector may be cut there (Matryoshka, arXiv 2205.13147).",
    )
    projector_dim: PositiveInt | None = documented(
        None, "Hidden width of the projectors. Auto: 4 times the encoder's, 768 to 2048."
    )
    predictor_dim: PositiveInt | None = documented(
        None, "Hidden width of the predictors. Auto: 5.33 times the encoder's, 1024 to 4096."
    )
    embedding_dim: PositiveInt | None = documented(
        None, "Width of projections and predictions. Auto: 128 below width 384, else 256."
    )
    queue_size: PositiveInt | None = documented(
        None,
        "Rows of the nearest-neighbour queue of each head; at least batch_size. Auto: a power of "
        "two, at most half the images and 65536.",
    )
    activation: Activation = documented(
        "gelu", "Between the layers of a head: gelu, or relu (MAE-CT)."
    )
    predictor_norm: bool = documented(
        True, "Batch norm at the end of the predictors; MAE-CT has none there."
    )
    norm_views: NormViews = documented(
        "together",
        "Batch statistics of the heads: over all views together, or of each view apart (MAE-CT).",
    )
    head_init: HeadInit = documented(
        "xavier",
        "First weights of the heads: xavier, uniform; or kaiming, as torch's own linear layers "
        "(MAE-CT).",
    )
    # ---- objective
    temperature: PositiveFloat | None = documented(
        None,
        "Temperature of the loss. Auto: 0.2 up to width 1024 (L), 0.3 up to 1280 (H), else 0.35 "
        "(2B).",
    )
    head_temperature: PositiveFloat | None = documented(
        None, "Temperature of the loss in the head warm-up. Auto: the refinement's."
    )
    target_momentum: ShareBetween | None = documented(
        None,
        "Momentum of a copy of the projectors that gives the targets in the refinement and fills "
        "the queue, which is then to be whole batches; it begins as the warm projectors (MAE-CT: "
        "0.99 or 0.995). None: the projectors themselves do.",
    )
    topk: PositiveInt | None = documented(
        None,
        "Neighbours to draw from in the refinement; the head warm-up takes the nearest. Auto: a "
        "hundredth of the queue, 1 to 20.",
    )
    swap: Swap | None = documented(
        None,
        "Where the neighbour replaces the target: positive (NNA), all (NNCLR), none (InfoNCE). "
        "Auto: none below 20000 images, whose neighbours are too far, else, and where forget or "
        "keep need neighbours, positive.",
    )
    pairs: Pairs = documented(
        "intended",
        "Which views are compared: each global one with every other; or released: as the authors' "
        "code, whose loop over the local views begins at the global ones.",
    )
    loss_schedule: LossSchedule = documented(
        "constant", "Loss weights of the earlier heads over the refinement (paper, Fig. 7)."
    )
    freeze_blocks: NonNegativeInt | None = documented(
        None,
        "Keep the embeddings and the first so many blocks as they are. Auto: 0, none; with lora:R "
        "those before the last third, or before the first head.",
    )
    trainable: Annotated[str, _TRAINABLE] = documented(
        "all",
        "What is trained of the encoder: all; last:N, its last N blocks, as freeze_blocks says it "
        "from the other end; or lora:R, adapters of rank R beside the linear layers of attention "
        'and MLP and nothing else (pip install "mim_refiner_hf[lora]"), kept in adapter/ too.',
    )
    # ---- views
    global_views: PositiveInt | None = documented(None, "Global views per image. Auto: 2.")
    local_views: NonNegativeInt | None = documented(
        None, "Local views per image. Auto: 10 from 20000 images on and on a GPU, else none."
    )
    global_size: PositiveInt | None = documented(
        None,
        "Side of a global view in pixels. Auto: 3/4 of the encoder's native size, in whole "
        "patches; the native size where there are local views.",
    )
    local_size: PositiveInt | None = documented(
        None,
        "Side of a local view. Auto: 3/7 of the native size, in whole patches (96 or 98 for 224).",
    )
    global_scale: AreaRange | None = documented(
        None,
        "Range of the area that a global view covers. Auto: 0.25 1 with local views, else 0.3 1.",
    )
    local_scale: AreaRange = documented([0.05, 0.25], "Range of the area that a local view covers.")
    colour: bool = documented(
        True,
        "Colour jitter, blur, greyscale and solarise; without them: crop and flip only (paper, "
        "Table 7).",
    )
    views: Literal["exact", "fast"] = documented(
        "exact",
        "How views are made: exact, by Pillow, the authors' code bit for bit; or fast, the same "
        "random choices on tensors (on a GPU colour is done there), a grey level or so apart.",
    )
    flip: Share = documented(
        0.5,
        "Probability of a horizontal flip; 0 for text, digits and other images with a handedness.",
    )
    # ---- schedule
    stage: Literal["both", "warmup", "refine"] = documented(
        "both", "Head warm-up, refinement, or one after the other."
    )
    epochs: PositiveFloat | None = documented(
        None,
        "Epochs of refinement. Auto: 30, but at least 300 updates, and without a GPU at most 600; "
        "with lora:R all of these times 1.5.",
    )
    head_epochs: NonNegativeFloat | None = documented(
        None,
        "Epochs of head warm-up on the frozen encoder; 0 for none. Auto: a fifth of the "
        "refinement's updates, at least 40.",
    )
    warmup_epochs: NonNegativeFloat | None = documented(
        None,
        "Epochs of linear learning-rate warm-up in each stage. Auto: a tenth of the refinement, "
        "at most a fifth of the head warm-up and 4 epochs.",
    )
    warmup_share: ShareBelowOne | None = documented(
        None,
        "Share of each stage's updates, rounded down, with learning-rate warm-up, instead of "
        "warmup_epochs (MAE-CT: 0.2).",
    )
    max_steps: PositiveInt | None = documented(None, "Updates per stage at most.")
    batch_size: Annotated[int, minimum(2)] | None = documented(
        None,
        "Images per update, all processes together. Auto: about 4 times the root of the number of "
        "images, a power of two, 32 to 1024, without a GPU at most 32; never more than half of "
        "them.",
    )
    learning_rate: PositiveFloat | None = documented(
        None,
        "Base learning rate of the refinement, encoder and heads; times batch_size / 256. Auto: "
        "the peak is 0.001 at width 192 and batch 64, less for wider encoders, more for batches; "
        "with lora:R ten times that.",
    )
    head_learning_rate: PositiveFloat | None = documented(
        None,
        "Base learning rate of the head warm-up; times batch_size / 256. Auto: the refinement's; "
        "with lora:R, and that open too, a tenth of it.",
    )
    refine_head_learning_rate: PositiveFloat | None = documented(
        None,
        "Base learning rate of the heads in the refinement; times batch_size / 256. Auto: that of "
        "the encoder, learning_rate; with lora:R, and that open too, a tenth of it.",
    )
    end_learning_rate: NonNegativeFloat = documented(
        1e-6, "Learning rate towards which the cosine of each stage falls (MAE-CT: 0)."
    )
    layer_decay: ShareAboveZero | None = documented(
        None,
        "Layer-wise learning-rate decay of the encoder. Auto: 0.85 up to 12 blocks, falling to "
        "0.65 at 24; with lora:R 1, none.",
    )
    weight_decay: NonNegativeFloat = documented(0.05, "Weight decay of the encoder.")
    head_weight_decay: NonNegativeFloat = documented(1e-5, "Weight decay of the heads.")
    ema_decay: ShareBelowOne | None = documented(
        None,
        "Decay of the moving average of the encoder, which is what ships. Auto: it reaches a tenth "
        "of the updates back, at most 0.9999.",
    )
    seed: Seed = documented(
        0, "Data order, views, neighbour draws and head weights are pure functions of it."
    )

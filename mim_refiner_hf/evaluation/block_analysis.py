"""What every block of an encoder is good for, and which blocks should carry the heads.

    from mim_refiner_hf.evaluation import block_profile, profile_table, propose_head_blocks
    profile = block_profile(encoder, encoder.image_processor, train_images, eval_images)
    print(profile_table(profile))
    blocks, reason = propose_head_blocks(profile)

The paper's analysis (MIM-Refiner, Sec. 2, App. C.2 and F): features of a masked-image model are
best somewhere in the middle, and its last blocks take over a part of the decoder's work: their
k-NN accuracy falls while their reconstruction loss improves (Fig. 3 and 6). Beside these two: mean
and variance of the features (Table 14), how far the attention reaches, and for images without
labels the agreement of neighbours under augmentation.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.images import evenly_spaced, fully_labelled
from ..data.loading import ImageProcessor, Loading, Processor
from ..model.modeling_mim_refiner import MimRefinerModel
from ..refinement.recipe_method import default_head_blocks
from .feature_cache import ImageRows, for_altered_images, read_rows
from .features import own_columns
from .neighbour_agreement import NUM_NEIGHBOURS, global_view, neighbour_agreement
from .reconstruction import reconstruction_losses
from .report import knn_of_columns

if TYPE_CHECKING:
    from ..data.images import ImageDataset

# all attention weights of a batch are in memory at once: 0.5 GB for a ViT-L/16
ATTENTION_IMAGES = 64
ATTENTION_BATCH = 8
# of an accuracy or agreement: what a block may lack to the best one without being called worse
SCORE_NOISE = 0.01
# field of `BlockProfile` -> title of its column, and how a value is written
PROFILE_COLUMNS = {
    "knn_accuracy": ("k-NN accuracy", "{:.1%}"),
    "knn_improvement": ("its improvement", "{:+.2f}"),
    "neighbour_agreement": ("neighbour agreement", "{:.1%}"),
    "reconstruction_loss": ("reconstruction loss", "{:.4f}"),
    "reconstruction_improvement": ("its improvement", "{:+.2f}"),
    "feature_mean": ("mean", "{:.3f}"),
    "feature_variance": ("variance", "{:.3f}"),
    "attention_distance": ("attention distance (px)", "{:.1f}"),
}


@dataclass(frozen=True)
class BlockProfile:
    """What was measured on one block, on its pooled raw output as in `extract_features`.

    Attributes:
        block: its 0-based number.
        knn_accuracy: k-NN accuracy of its features (0 to 1; paper, Fig. 3b); None without labels.
        neighbour_agreement: see `neighbour_agreement` (0 to 1); needs no labels.
        reconstruction_loss: see `reconstruction_losses` (Fig. 6); None if it was not asked for.
        knn_improvement: change of the k-NN accuracy from the block before, as a share of the
            largest change (Fig. 3d, App. C.2); None for the first block and without labels.
        reconstruction_improvement: the same for the reconstruction loss, positive where it falls.
        feature_mean, feature_variance: mean over the channels of each channel's mean and unbiased
            variance (Table 14).
        attention_distance: see `attention_distances`, in pixels.
    """

    block: int
    knn_accuracy: float | None
    neighbour_agreement: float
    reconstruction_loss: float | None
    knn_improvement: float | None
    reconstruction_improvement: float | None
    feature_mean: float
    feature_variance: float
    attention_distance: float


# --- the measurements ------------------------------------------------------------------------


def relative_improvements(values: Sequence[float]) -> list[float | None]:
    """Each change from one value to the next over the largest change (paper, App. C.2).

    None for the first value. Where nothing improves, the largest fall is the unit, so that signs
    stay what they say. For a loss, give it negated.
    """
    changes = [after - before for before, after in itertools.pairwise(values)]
    unit = max(changes, default=0.0)
    if unit <= 0:
        unit = -min(changes, default=0.0) or 1.0
    return [None, *(change / unit for change in changes)]


@torch.inference_mode()
def attention_distances(encoder: MimRefinerModel, pixels: Tensor) -> list[float]:
    """How far each block looks: the distance in pixels from a patch to what it attends to.

    Weighted by the attention; the mean over images, heads and query patches (Dosovitskiy et al.
    2021, arXiv 2010.11929, App. D.7). CLS and registers have no place: attention on them is left
    out and the rest scaled to sum 1.

    Args:
        pixels: normalised images (B, C, H, W) of the native size.
    """
    config = encoder.config
    rows, columns = (torch.arange(count, device=pixels.device) for count in config.grid)
    places = config.patch_size * torch.cartesian_prod(rows, columns).float()  # (N, 2)
    distance = torch.cdist(places, places)  # (N, N)

    prefix = config.num_prefix_tokens
    total = torch.zeros(config.num_hidden_layers, dtype=torch.float64)
    # the eager kernel is the only one that returns its weights
    kernel = config._attn_implementation
    encoder.set_attn_implementation("eager")
    try:
        for batch in pixels.split(ATTENTION_BATCH):
            for block, weights in enumerate(encoder(batch, output_attentions=True).attentions):
                weights = weights[:, :, prefix:, prefix:].float()  # (b, heads, N, N)
                weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
                reach = (weights * distance).sum(dim=-1).mean()
                total[block] += len(batch) * reach.double().cpu()
    finally:
        encoder.set_attn_implementation(kernel)
    return (total / len(pixels)).tolist()


# --- the profile -----------------------------------------------------------------------------


def block_profile(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    flip: float = 0.5,
    reconstruction_epochs: int = 0,
    seed: int = 0,
    features: Path | None = None,
    loading: Loading = Loading(),
) -> list[BlockProfile]:
    """Profile all blocks, first block first. Every process of a job gets the same.

    Args:
        encoder: comes back as it came.
        processor: its image processor.
        train_images: the k-NN bank, and what the decoders of the reconstruction are trained on.
        eval_images: what everything is measured on.
        flip: probability of a horizontal flip, in the view behind `neighbour_agreement` and in
            the decoders' training.
        reconstruction_epochs: of the decoders' training (20 in the paper); 0 leaves the
            reconstruction out, which by far costs most.
        seed: of the view and of the decoders.
        features: see `read_rows`.
        loading: of the passes over the images.

    Raises:
        ValueError: for fewer than 11 images in either set, and what `reconstruction_losses`
            refuses.
    """
    for name, images in (("train_images", train_images), ("eval_images", eval_images)):
        if len(images) <= NUM_NEIGHBOURS:
            raise ValueError(
                f"{name} has {len(images)} images; the analysis looks at {NUM_NEIGHBOURS} "
                "neighbours and needs more"
            )

    losses: list[float] | None = None
    if reconstruction_epochs:
        losses = reconstruction_losses(
            encoder,
            processor,
            train_images,
            eval_images,
            epochs=reconstruction_epochs,
            flip=flip,
            seed=seed,
            num_workers=loading.num_workers,
        )

    columns = own_columns(encoder.config)

    def read(images: "ImageDataset", shown: Processor, folder: Path | None, what: str) -> ImageRows:
        desc = f"block analysis: {what}"
        return read_rows(
            encoder, images, shown, columns, features=folder, loading=loading, desc=desc
        )

    clean = read(eval_images, processor, features, "images")
    accuracies: list[float] | None = None
    if fully_labelled(train_images) and fully_labelled(eval_images):
        bank = read(train_images, processor, features, "k-NN bank")
        accuracies = knn_of_columns(bank, clean, columns, say_known=True)

    view = global_view(processor, encoder.config.image_hw[0], flip, seed)
    altered = read(eval_images, view, for_altered_images(features), "augmented images")
    vectors = [clean.column(column) for column in columns]
    agreements = []
    for column, own in zip(columns, vectors, strict=True):
        agreements.append(neighbour_agreement(own, altered.column(column)).mean().item())

    few = evenly_spaced(eval_images, ATTENTION_IMAGES)
    distances = attention_distances(encoder, pixels_of(few, processor, encoder.device))
    return assemble(accuracies, agreements, losses, vectors, distances)


def pixels_of(images: "ImageDataset", processor: Processor, device: torch.device) -> Tensor:
    """All images of a small set as one batch (N, C, H, W)."""
    pictures = [images[i].image for i in range(len(images))]
    pixels: Tensor = processor(pictures, return_tensors="pt")["pixel_values"]
    return pixels.to(device)


def assemble(
    accuracies: list[float] | None,
    agreements: list[float],
    losses: list[float] | None,
    features: list[Tensor],
    distances: list[float],
) -> list[BlockProfile]:
    """One `BlockProfile` per block from one list per quantity; None where it was not measured."""
    not_measured: list[float | None] = [None] * len(features)
    knn_improvements = not_measured
    reconstruction_improvements = not_measured
    if accuracies is not None:
        knn_improvements = relative_improvements(accuracies)
    if losses is not None:
        reconstruction_improvements = relative_improvements([-loss for loss in losses])

    profile = []
    for block, vectors in enumerate(features):
        variance, mean = torch.var_mean(vectors, dim=0)
        profile.append(
            BlockProfile(
                block=block,
                knn_accuracy=(accuracies or not_measured)[block],
                neighbour_agreement=agreements[block],
                reconstruction_loss=(losses or not_measured)[block],
                knn_improvement=knn_improvements[block],
                reconstruction_improvement=reconstruction_improvements[block],
                feature_mean=mean.mean().item(),
                feature_variance=variance.mean().item(),
                attention_distance=distances[block],
            )
        )
    return profile


# --- what it says ----------------------------------------------------------------------------


def propose_head_blocks(profile: Sequence[BlockProfile], frozen: int = 0) -> tuple[list[int], str]:
    """The blocks that should carry heads, ascending up to the last, and why in one sentence.

    The paper attaches heads to the last third of the blocks, which should include those with the
    best features; heads before them gain nothing and cost (Sec. 5.1, Table 1a). So: the last
    third, or from the best block on if that comes earlier, but not before the middle. The best
    block is the last whose score is within a point of the highest one: an earlier one has to be
    clearly better. The score is k-NN accuracy; without labels, the agreement of neighbours under
    augmentation.

    Args:
        profile: of all blocks, first block first.
        frozen: blocks at the start that are not trained, and so carry no head.

    Raises:
        ValueError: for a profile without blocks, or all of them frozen.
    """
    depth = len(profile)
    if not 0 <= frozen < depth:
        raise ValueError(
            f"frozen={frozen} of {depth} blocks; at least one block must be there to be trained"
        )

    name = "agreement of neighbours under augmentation"
    scores = [block.neighbour_agreement for block in profile]
    accuracies = [block.knn_accuracy for block in profile if block.knn_accuracy is not None]
    if len(accuracies) == depth:
        name = "k-NN accuracy"
        scores = accuracies

    highest = max(scores)
    best = max(block for block, score in enumerate(scores) if score >= highest - SCORE_NOISE)
    third = default_head_blocks(depth)[0]
    earliest = min(best, third)
    start = max(earliest, min(depth // 2, third), frozen)

    reason = f"{name} is best in block {best} ({100 * scores[best]:.1f} %)"
    if best < depth - 1:
        reason += f" and falls to {100 * scores[-1]:.1f} % in block {depth - 1}"
    if best >= third:
        reason += f": the last third of the blocks, {third} to {depth - 1}, includes it"
    elif best >= depth // 2:
        reason += ", before the last third of the blocks: heads from there on"
    else:
        reason += ": so early that heads go on the last half of the blocks"
    if start == frozen > earliest:
        reason += f"; the first {frozen} blocks are frozen"
    return list(range(start, depth)), reason


def profile_table(profile: Sequence[BlockProfile]) -> str:
    """The profile as a table in Markdown, aligned for the terminal as well.

    Columns that were not measured are left out.
    """
    columns = [["block", *(str(block.block) for block in profile)]]
    for field, (title, form) in PROFILE_COLUMNS.items():
        cells = []
        for block in profile:
            value = getattr(block, field)
            cells.append("" if value is None else form.format(value))
        if any(cells):
            columns.append([title, *cells])

    aligned = []
    for column in columns:
        width = max(map(len, column))
        aligned.append([cell.rjust(width) for cell in column])
    lines = [f"| {' | '.join(row)} |" for row in zip(*aligned, strict=True)]

    rule = "|".join("-" * (len(column[0]) + 1) + ":" for column in aligned)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])

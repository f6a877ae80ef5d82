"""Fine-tuning: the whole encoder and a linear classifier, trained on labelled images.

    mim-refiner evaluate MODEL --dataset DATA --protocols fine_tuning --recipe fine-tune-1percent

    recipe = FineTuneRecipe(epochs=20)      # or one of training/recipes/, by read_fields
    model = fine_tune(encoder, processor, images, recipe)      # MimRefinerForImageClassification
    result = fine_tuning(encoder, processor, train_images, eval_images, recipe=recipe)

The recipes (MIM-Refiner, C.5, C.6, C.9; the released code's settings where the paper has none):

- fine-tune-inat: the paper's table 12: crop, flip, label smoothing; the defaults of the fields;
- fine-tune-few-shot: the same at a tenth of the rate, on 1, 2 or 5 images per class;
- fine-tune-1percent, -h14, -2b14: the same at a small learning rate, on 1 % of the labels;
- fine-tune-10percent: a small rate and RandAugment, on 10 %; -h14, -2b14 and, for the unrefined
  data2vec 2.0, -d2v2-l16: also mixup, CutMix, erasing and drop path;
- fine-tune-100percent, -h14: MAE's recipes (MAE, table 9).

AdamW (0.9, 0.999) with layer-wise decayed rates, linear warm-up, cosine to 1e-6; positions are
trained too, without weight decay. The classifier reads the encoder's output; an encoder without a
final norm (post-norm, CrossMAE) gets a fresh one. The model after the last epoch counts: no choice
is made on the evaluation images. RandAugment, mixup, CutMix, erasing and drop path are timm's.
Works under `accelerate launch`: each process takes its share of every batch. The file is long
because recipe, images and training are each read with the others.
"""

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers.drop import drop_path
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle

from ..clustering.channels import as_picture
from ..data.images import Key
from ..data.loading import ImageProcessor, Loading
from ..data.order import BatchSampler
from ..data.reading import read_sample
from ..data.split_files import listed_places
from ..data.views import ViewSpec, make_view, normalise
from ..model.modeling_mim_refiner import MimRefinerForImageClassification, MimRefinerModel
from ..runtime.distributed import average_gradients, progress_bar, rank, world_size
from ..runtime.optimisation import encoder_groups, freeze, learning_rate, set_learning_rate
from ..runtime.seeding import random_generator
from ..runtime.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    ShareAboveZero,
    check_fields,
    documented,
)
from ..runtime.wording import setting
from .features import pixel_batches
from .scores import ProtocolResult, class_labels, mean_score

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ..data.images import ImageDataset

# MAE's RandAugment
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
# MAE's: the classifier starts next to zero
CLASSIFIER_STD = 2e-5


@dataclass
class FineTuneRecipe:
    """All settings of a fine-tuning; the defaults are the paper's for iNaturalist (table 12)."""

    recipe_prefix: ClassVar[str] = "fine-tune-"

    fraction: ShareAboveZero = documented(
        1.0, "Share of the images of every class that is trained on, at least one of each."
    )
    epochs: PositiveInt = documented(50, "Epochs.")
    warmup_epochs: NonNegativeFloat = documented(5.0, "Epochs of linear learning-rate warm-up.")
    batch_size: PositiveInt = documented(
        256, "Images per update, all processes together; all of them where there are fewer."
    )
    learning_rate: PositiveFloat = documented(1e-3, "Base learning rate; times batch_size / 256.")
    layer_decay: ShareAboveZero = documented(0.75, "Layer-wise learning-rate decay.")
    weight_decay: NonNegativeFloat = documented(
        0.05, "Weight decay; none on biases, norms, positions and the CLS token."
    )
    freeze_blocks: NonNegativeInt = documented(
        0, "Keep the embeddings and the first so many blocks as they are."
    )
    label_smoothing: Share = documented(0.1, "Share of the target that is spread over all classes.")
    drop_path: Share = documented(
        0.0, "Stochastic depth of the last block; it grows linearly from 0 in the first."
    )
    scale: ShareAboveZero = documented(0.08, "Smallest share of the image's area in a crop.")
    flip: Share = documented(0.5, "Probability of a horizontal flip.")
    rand_augment: bool = documented(
        False, "RandAugment with two operations of magnitude 9 (rand-m9-mstd0.5-inc1)."
    )
    erasing: Share = documented(0.0, "Probability of erasing a rectangle, with noise.")
    mixup: NonNegativeFloat = documented(
        0.0, "Alpha of mixup; a batch gets mixup or CutMix, either as likely where both are on."
    )
    cutmix: NonNegativeFloat = documented(0.0, "Alpha of CutMix.")
    seed: NonNegativeInt = documented(0, "Of everything random.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"{setting('warmup_epochs', self.warmup_epochs)}: must be less than "
                f"{setting('epochs', self.epochs)}"
            )

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0


# --- data ------------------------------------------------------------------------------------


def labelled_share(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Sorted places of `fraction` of the images of every class, rounded, at least one.

    A pure function of its arguments.
    """
    shuffled = random_generator(seed, "labelled share").permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        places = shuffled[labels[shuffled] == label]
        chosen.append(places[: max(1, round(fraction * len(places)))])
    return np.sort(np.concatenate(chosen))


@contextmanager
def seeded(generator: np.random.Generator) -> Iterator[None]:
    """Inside, what draws from the global generators draws from this one.

    timm's augmentations do. Afterwards the global ones are where they were.
    """
    python, numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int(generator.integers(2**32))
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(of_torch)


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Key (epoch, i) -> normalised pixels (C, H, W) and label of image i, augmented.

    A pure function of seed, epoch and image.
    """

    def __init__(
        self, images: "ImageDataset", recipe: FineTuneRecipe, size: int, processor: ImageProcessor
    ) -> None:
        self.images = images
        self.seed = recipe.seed
        self.mean = processor.image_mean
        self.std = processor.image_std
        self.crop = ViewSpec(size, (recipe.scale, 1.0), flip=recipe.flip)

        self.rand_augment: RandAugment | None = None
        if recipe.rand_augment:
            # what stands where a shifted image has no pixels: a tuple, or of one channel a number
            grey = [round(255 * value) for value in self.mean]
            fill = tuple(grey) if len(grey) > 1 else grey[0]
            settings = {"translate_const": int(0.45 * size), "img_mean": fill}
            self.rand_augment = rand_augment_transform(RAND_AUGMENT, settings)
            for operation in self.rand_augment.ops:
                if operation.name == "PosterizeIncreasing":
                    operation.aug_fn = _posterize
        self.erase: RandomErasing | None = None
        if recipe.erasing:
            self.erase = RandomErasing(recipe.erasing, mode="pixel", device="cpu")

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        # after it come the image, and those that stand in for it where it is broken
        epoch = key[0]
        (image, label, _), index, broken = read_sample(self.images, key)
        for entry in broken:
            logger.warning("%s It is skipped.", entry["reason"])

        rng = random_generator(self.seed, "fine-tuning", epoch, index)
        view = make_view(as_picture(image), self.crop, rng)
        with seeded(rng):
            if self.rand_augment is not None:
                view = self.rand_augment(view)
            pixels = torch.from_numpy(np.array(view))
            pixels = pixels.view(self.crop.size, self.crop.size, -1).permute(2, 0, 1)
            pixels = normalise(pixels, self.mean, self.std)
            if self.erase is not None:
                pixels = self.erase(pixels)
        return pixels, label


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The highest bits of each channel; 0 bits, from a magnitude of 10, is black.

    timm hands 0 on, which Pillow took until version 12 and now refuses.
    """
    if bits == 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits)


# --- training --------------------------------------------------------------------------------


def make_classifier(
    encoder: MimRefinerModel, num_classes: int, freeze_blocks: int = 0
) -> MimRefinerForImageClassification:
    """A copy of the encoder in fp32 with a classifier next to zero.

    The classifier reads the encoder's output: where the encoder has no final norm, the copy gets a
    fresh one. Everything is trained but the frequencies of rope and, with `freeze_blocks`, the
    embeddings and the first so many blocks.
    """
    config = copy.deepcopy(encoder.config)
    config.num_labels = num_classes
    config.final_norm = True
    config.features = "output"
    model = MimRefinerForImageClassification(config)
    state = dict(encoder.state_dict())
    if not encoder.config.final_norm:
        # weight 1, bias 0
        state |= model.encoder.norm.state_dict(prefix="norm.")
    model.encoder.load_state_dict(state)

    # it is one, as num_classes is at least 1
    assert isinstance(model.classifier, nn.Linear)
    nn.init.trunc_normal_(model.classifier.weight, std=CLASSIFIER_STD)
    nn.init.zeros_(model.classifier.bias)
    model.requires_grad_(True)
    freeze(model.encoder, freeze_blocks, positions=True)
    return model


def add_drop_path(model: MimRefinerForImageClassification, rate: float) -> list[RemovableHandle]:
    """Stochastic depth on both residual branches of every block while training.

    0 in the first block, growing linearly to `rate` in the last. Returns the hooks, to be removed
    after training.
    """
    hooks = []
    layers: Any = model.encoder.layers
    for i, layer in enumerate(layers):
        probability = rate * i / max(len(layers) - 1, 1)

        def drop(module: nn.Module, _inputs: Any, output: Tensor, p: float = probability) -> Tensor:
            return drop_path(output, p, module.training)

        for branch in (layer.layer_scale1, layer.layer_scale2):
            hooks.append(branch.register_forward_hook(drop))
    return hooks


def classifier_groups(
    model: MimRefinerForImageClassification, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The encoder's groups with layer-wise decayed rates; the classifier's have the full rate."""
    own: list[dict[str, Any]] = [
        {"params": [model.classifier.weight], "lr_scale": 1.0, "weight_decay": weight_decay},
        {"params": [model.classifier.bias], "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return encoder_groups(model.encoder, layer_decay, weight_decay) + own


def check_fine_tuning(
    encoder: MimRefinerModel, images: "ImageDataset", recipe: FineTuneRecipe
) -> None:
    """ValueError, in one sentence, for what `fine_tune` cannot run on."""
    class_labels(images, "fine-tuning")
    height, width = encoder.config.image_hw
    if height != width:
        raise ValueError(
            f"fine-tuning crops squares, but the encoder takes {height} x {width} pixels"
        )
    layers = encoder.config.num_hidden_layers
    if recipe.freeze_blocks > layers:
        raise ValueError(
            f"{setting('freeze_blocks', recipe.freeze_blocks)}: the encoder has {layers} blocks"
        )
    if len(images) < max(2, world_size()):
        raise ValueError(
            f"fine-tuning needs {max(2, world_size())} images or more, and has {len(images)}"
        )
    share = _share(images, recipe)
    if recipe.mixes and share % 2:
        raise ValueError(
            f"mixup and CutMix pair the images of a batch, but a process has {share} of them; make "
            "it even"
        )


def _share(images: "ImageDataset", recipe: FineTuneRecipe) -> int:
    """Images of a batch that this process takes."""
    return min(recipe.batch_size, len(images)) // world_size()


def fine_tune(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    images: "ImageDataset",
    recipe: FineTuneRecipe,
    *,
    loading: Loading = Loading(),
) -> MimRefinerForImageClassification:
    """Train a copy of `encoder` and a classifier on all of `images`.

    Args:
        encoder, processor: the starting weights, which stay as they are, and the image processor,
            of which mean and std are used.
        images: labelled.
        recipe: the settings; its `fraction` is not applied here.
        loading: images per pass (the gradients of an update's passes are summed exactly), workers,
            and where to train, in bf16 autocast if it is a GPU.

    Returns:
        The model in eval mode, where it was trained.

    Raises:
        ValueError: for missing labels, an input that is not square, and mixing with an odd batch.
        FloatingPointError: for a loss that is not finite.
    """
    check_fine_tuning(encoder, images, recipe)
    num_classes = int(class_labels(images, "fine-tuning").max()) + 1
    height, _ = encoder.config.image_hw
    batch = _share(images, recipe) * world_size()
    sampler = BatchSampler(
        images,
        batch_size=batch,
        seed=recipe.seed,
        steps=recipe.epochs * (len(images) // batch),
        rank=rank(),
        world_size=world_size(),
    )
    augmented = AugmentedImages(images, recipe, height, processor)
    loader = DataLoader(augmented, batch_sampler=sampler, num_workers=loading.num_workers)

    home = encoder.device if loading.device is None else torch.device(loading.device)
    gpus = [home] if home.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(recipe.seed)
        model = make_classifier(encoder, num_classes, recipe.freeze_blocks).train().to(home)
        # what drop path draws differs between processes
        torch.manual_seed(recipe.seed + rank())
        hooks = add_drop_path(model, recipe.drop_path)
        train_classifier(model, loader, recipe, batch, loading.batch_size)
        for hook in hooks:
            hook.remove()
    return model.eval()


def train_classifier(
    model: MimRefinerForImageClassification,
    loader: DataLoader[Any],
    recipe: FineTuneRecipe,
    batch: int,
    micro_batch: int,
) -> None:
    """The updates of `fine_tune`.

    Args:
        loader: of this process's share of every batch.
        batch: images per update, all processes together.
        micro_batch: images per pass.
    """
    groups = classifier_groups(model, recipe.layer_decay, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))
    parameters: list[nn.Parameter] = []
    for group in groups:
        parameters += group["params"]
    steps = len(loader)
    warmup = round(recipe.warmup_epochs * steps / recipe.epochs)
    peak = recipe.learning_rate * batch / 256

    home = model.device
    mix: Mixup | None = None
    if recipe.mixes:
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=model.num_labels)

    progress = progress_bar(loader, total=steps, desc="fine-tuning", unit="step", leave=False)
    for step, (pixels, labels) in enumerate(progress):
        pixels, labels = pixels.to(home), labels.to(home)
        targets = F.one_hot(labels, model.num_labels).float()
        if mix is not None:
            with seeded(random_generator(recipe.seed, "mix", step, rank())):
                pixels, targets = mix(pixels, labels)

        set_learning_rate(optimizer, learning_rate(step, warmup, steps, peak))
        optimizer.zero_grad()
        passes = zip(pixels.split(micro_batch), targets.split(micro_batch), strict=True)
        for some, expected in passes:
            with torch.autocast(home.type, torch.bfloat16, enabled=home.type == "cuda"):
                logits = model(some).logits
            loss = F.cross_entropy(logits.float(), expected, label_smoothing=recipe.label_smoothing)
            if not bool(loss.isfinite()):
                raise FloatingPointError(
                    f"the loss of fine-tuning is {loss.item()} at step {step}; lower learning_rate"
                )
            (loss * (len(some) / len(pixels))).backward()
        average_gradients(parameters)
        optimizer.step()


# --- the protocol ----------------------------------------------------------------------------


def chosen_images(
    images: "ImageDataset", recipe: FineTuneRecipe, split_file: Path | None
) -> tuple["ImageDataset", str]:
    """The images to train on, a list's or the recipe's share, and in words where they are from."""
    labels = class_labels(images, "fine-tuning")
    if split_file is not None:
        listed = np.sort(listed_places(images, split_file))
        return images.subset(listed), f"listed in {split_file.name}"
    places = labelled_share(labels, recipe.fraction, recipe.seed)
    origin = "all"
    if len(places) < len(labels):
        origin = f"drawn, {recipe.fraction:g} of all"
    return images.subset(places), origin


def fine_tuning(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    recipe: FineTuneRecipe | None = None,
    split_file: Path | None = None,
    seed: int = 0,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """Accuracy after fine-tuning on the recipe's share of `train_images`, or on listed ones.

    Args:
        encoder, processor, loading: as in `fine_tune`.
        train_images, eval_images: labelled.
        recipe: None for the defaults with `seed`, which is not used otherwise: the recipe has its
            own.
        split_file: a list of file names, see `listed_places`, in place of the recipe's `fraction`.

    Returns:
        `fine_tuning_accuracy`, with the standard error over the evaluation images.
    """
    recipe = recipe or FineTuneRecipe(seed=seed)
    targets = torch.from_numpy(class_labels(eval_images, "fine-tuning"))
    chosen, origin = chosen_images(train_images, recipe, split_file)
    model = fine_tune(encoder, processor, chosen, recipe, loading=loading)

    answers = []
    with torch.inference_mode():
        for pixels, _ in pixel_batches(eval_images, processor, loading):
            answers.append(model(pixels.to(model.device)).logits.argmax(dim=1).cpu())
    setting = (
        f"{len(chosen)} images ({origin}), {recipe.epochs} epochs, "
        f"learning rate {recipe.learning_rate:g}, layer decay {recipe.layer_decay:g}"
    )
    score = mean_score(torch.cat(answers) == targets, setting)
    return ProtocolResult({"fine_tuning_accuracy": score})

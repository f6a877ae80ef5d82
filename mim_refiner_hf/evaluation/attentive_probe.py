"""Attentive probe: a linear layer on what one learned query takes of the frozen patches.

    result = attentive_probe(encoder, processor, train_images, eval_images)
    print(result.scores["attentive_probe_accuracy"])
    # 61.0 % ± 0.8   (learning rate 0.0005, weight decay 0.001; chosen on 2000 held-out images)

CAPI's protocol (arXiv 2502.08769, the released code). A classifier is a cross-attention with one
learned query and width / 64 heads over the patches of the encoder's output; keys and values have
biases, the query and the output no projection of their own; a linear layer names the class. Thirty
are trained at once, of ten learning rates (times batch / 256) and three weight decays, by AdamW
with a linear warm-up over a tenth of the steps and a cosine to zero, on random crops and flips. The
one that is best on a tenth of the TRAINING images, which trains none, is reported.

The authors take 12 500 steps of 1 024 images, which are ten passes over ImageNet. Here the batch is
a hundredth of the images, between 32 and 1 024, and there are ten passes, or 500 steps where those
are fewer: on ImageNet the same.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.loading import ImageProcessor, Loading
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import progress_bar
from .features import frozen, pixel_batches, random_crops
from .scores import ProtocolResult, class_labels, mean_score

if TYPE_CHECKING:
    from ..data.images import ImageDataset

# the authors' grid
ATTENTIVE_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
ATTENTIVE_DECAYS = (5e-4, 1e-3, 5e-2)
# passes over the training images, and the fewest steps
_PASSES = 10
_FEWEST_STEPS = 500
_SMALLEST_BATCH = 32
_LARGEST_BATCH = 1024
# of the training images, to choose the classifier on
_HELD_OUT = 10
_HEAD_WIDTH = 64

# Shapes below: B images, N patches an image, D width of the encoder, H heads, K classes.


class AttentiveClassifier(nn.Module):
    """[cross-attention with one query - linear] of patches (B, N, D) -> logits (B, K).

    A key is never made: the query goes through its projection once, instead of all patches. Nor is
    the value of a patch: a mean of values is the value of the mean. The result is the same.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.heads = max(dim // _HEAD_WIDTH, 1)
        if dim % self.heads:
            self.heads = 1
        self.query = nn.Parameter(torch.empty(dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.linear = nn.Linear(dim, num_classes)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> "AttentiveClassifier":
        """Give it the authors' initial weights, normal with a deviation of 0.02; itself."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        return self

    def forward(self, patches: Tensor) -> Tensor:
        query = self.query.view(self.heads, -1)  # (H, D / H)
        key = self.key.weight.view(self.heads, query.shape[1], -1)
        # a key's bias adds the same to all patches of a head, which a softmax does not see
        asked = torch.einsum("he,hed->hd", query, key) * query.shape[1] ** -0.5
        attention = (patches @ asked.T).softmax(dim=1)  # (B, N, H)

        seen = attention.transpose(1, 2) @ patches  # (B, H, D)
        value = self.value.weight.view_as(key)
        pooled = torch.einsum("bhd,hed->bhe", seen, value).flatten(1) + self.value.bias
        logits: Tensor = self.linear(pooled)
        return logits


class AttentiveProbes:
    """A grid of attentive classifiers that are trained on the same patches.

    Args:
        settings: (learning rate, weight decay) of each, scaled.
        steps: of the training.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        settings: Sequence[tuple[float, float]],
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.steps = steps
        self.classifiers = []
        groups = []
        for rate, decay in settings:
            # weights to be trained, also where it is made inside of inference mode
            with torch.inference_mode(False):
                classifier = AttentiveClassifier(dim, num_classes).start(generator).to(device)
            self.classifiers.append(classifier)
            named = list(classifier.named_parameters())
            for biases in (False, True):
                own = [weight for name, weight in named if name.endswith("bias") == biases]
                kept = 0.0 if biases else decay
                groups.append({"params": own, "weight_decay": kept, "peak": rate})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))

    def train_step(self, step: int, patches: Tensor, labels: Tensor) -> None:
        """One update of every classifier."""
        share = attentive_schedule(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        with torch.inference_mode(False), torch.enable_grad():
            patches, labels = patches.clone(), labels.clone()
            # one at a time, so that one graph is in memory
            for classifier in self.classifiers:
                F.cross_entropy(classifier(patches), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def predict(self, patches: Tensor) -> Tensor:
        """What each of C classifiers says of B images (C, B)."""
        return torch.stack([classifier(patches).argmax(dim=1) for classifier in self.classifiers])


def attentive_schedule(step: int, steps: int) -> float:
    """The share of the peak rate at a step: a linear warm-up over a tenth, then a cosine to 0."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class _Length(NamedTuple):
    batch: int
    steps: int


def length_of(images: int) -> _Length:
    """Images per update, and updates, for so many training images."""
    batch = min(max(images // 100, _SMALLEST_BATCH), _LARGEST_BATCH, images)
    return _Length(batch, max(_PASSES * (images // batch), _FEWEST_STEPS))


def patches_of(encoder: MimRefinerModel, pixels: Tensor) -> Tensor:
    """The patches (B, N, D) of the encoder's output, final norm included, in fp32."""
    output = encoder(pixels.to(encoder.device)).last_hidden_state
    patches: Tensor = output[:, encoder.config.num_prefix_tokens :].float()
    return patches


def attentive_probe(
    encoder: MimRefinerModel,
    processor: ImageProcessor,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    *,
    learning_rates: Sequence[float] = ATTENTIVE_RATES,
    weight_decays: Sequence[float] = ATTENTIVE_DECAYS,
    steps: int | None = None,
    seed: int = 0,
    loading: Loading = Loading(),
) -> ProtocolResult:
    """Accuracy of the best of a grid of attentive classifiers on frozen patches.

    Args:
        encoder, processor: the model, which stays as it is, and its image processor.
        train_images: labelled; a tenth of them chooses the classifier.
        eval_images: labelled.
        learning_rates: of the grid, before their scaling by batch / 256.
        weight_decays: of the grid; biases never decay.
        steps: of the training; None for those of the protocol.
        seed: of the tenth, the order, the crops and the classifiers' start.
        loading: of the passes of the encoder; the classifiers compute where it does.

    Returns:
        `attentive_probe_accuracy`, of the classifier that is best on the held-out tenth.

    Raises:
        ValueError: for missing labels, fewer than 10 training images, an encoder whose input is not
            square, and a grid that makes no sense.
    """
    check_attentive(encoder, train_images, eval_images, learning_rates, weight_decays, steps)
    shuffled = np.random.default_rng(42).permutation(len(train_images))
    held = len(train_images) // _HELD_OUT
    chosen_on = train_images.subset(np.sort(shuffled[:held]))
    trained_on = train_images.subset(np.sort(shuffled[held:]))

    batch, own_steps = length_of(len(trained_on))
    steps = own_steps if steps is None else steps
    settings = list(itertools.product(learning_rates, weight_decays))
    scaled = [(rate * batch / 256, decay) for rate, decay in settings]
    classes = np.concatenate([images.labels for images in (train_images, eval_images)])
    with frozen(encoder, loading.device) as device:
        width = encoder.config.hidden_size
        probes = AttentiveProbes(width, int(classes.max()) + 1, scaled, steps, seed, device)
        batches = random_crops(
            encoder, trained_on, processor, loading, batch=batch, steps=steps, seed=seed
        )
        progress = progress_bar(
            batches, total=steps, desc="attentive probe", unit="step", leave=False
        )
        for step, (parts, labels) in enumerate(progress):
            patches = torch.cat([patches_of(encoder, pixels) for pixels in parts])
            probes.train_step(step, patches, labels)

        best = int(_correct(probes, encoder, chosen_on, processor, loading).sum(dim=1).argmax())
        probes.classifiers = [probes.classifiers[best]]
        correct = _correct(probes, encoder, eval_images, processor, loading)[0]

    rate, decay = settings[best]
    setting = (
        f"learning rate {rate:g}, weight decay {decay:g}; chosen on {held} held-out training images"
    )
    return ProtocolResult({"attentive_probe_accuracy": mean_score(correct, setting)})


def _correct(
    probes: AttentiveProbes,
    encoder: MimRefinerModel,
    images: "ImageDataset",
    processor: ImageProcessor,
    loading: Loading,
) -> Tensor:
    """Which answers of C classifiers are right (C, N)."""
    correct = []
    for pixels, labels in pixel_batches(images, processor, loading):
        said = probes.predict(patches_of(encoder, pixels))
        correct.append(said == labels.to(said.device))
    return torch.cat(correct, dim=1)


def check_attentive(
    encoder: MimRefinerModel,
    train_images: "ImageDataset",
    eval_images: "ImageDataset",
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    steps: int | None,
) -> None:
    """ValueError, in one sentence, for what `attentive_probe` cannot run on."""
    for images in (train_images, eval_images):
        class_labels(images, "attentive probing")
    if len(train_images) < _HELD_OUT:
        raise ValueError(
            f"{train_images.name} has {len(train_images)} training images, but the attentive probe "
            f"holds out one in {_HELD_OUT}; give {_HELD_OUT} or more"
        )

    height, width = encoder.config.image_hw
    if height != width:
        raise ValueError(
            f"the attentive probe crops squares, but the encoder takes {height} x {width} pixels"
        )

    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates={tuple(learning_rates)} must be greater than 0")
    if not weight_decays or min(weight_decays) < 0:
        raise ValueError(f"weight_decays={tuple(weight_decays)} must be 0 or more")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")

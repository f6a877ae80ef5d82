"""Groups of features by cluster heads: prototypes trained by self-distillation between neighbours.

    from mim_refiner_hf.clustering import train_heads
    groups = train_heads(features, num_clusters=10)         # a `Clustering`, as `kmeans` gives
    groups.save(Path("groups.safetensors"))
    labels, confidence = Clustering.load(Path("groups.safetensors")).assign(new_features)

Two neighbours in feature space are mostly of one kind. So each head learns to give a row the class
that an averaged copy of itself, the teacher, gives to one of its neighbours, while the objective, a
pointwise mutual information, keeps all classes in use (TEMI, Adaloglou et al. 2023, arXiv
2303.17896). Several heads are trained at once and agree on one grouping. Where it is better than
k-means and where not: benchmarks/results/cluster-heads.md of the package.

Objective, weights of pairs, temperature and exponent are those of the authors' code
(HHU-MMBS/TEMI-official-BMVC2023 @ c02631b). Other than there, a head is one layer of prototypes on
standardised features and starts from k-means, not two layers from random weights, so that some
hundred steps do in place of 100 epochs; and the teacher follows faster. The heads then agree on one
grouping, and its surest rows train the classifier that is kept, as ICCE (Baydar & Akbas 2025, arXiv
2511.16213) trains one on the pseudo-labels of a consensus.

This file travels with saved models: it imports only torch, transformers and its flat neighbours.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging as bars
from transformers.utils.import_utils import is_scipy_available

from .confidence import agreement, fitted, second_clusterings
from .k_means import Clustering, kmeans
from .lloyd import own_distances
from .prototype_heads import PrototypeHeads, class_logits, standardised
from .row_batches import bad_rows, prepared, products, refuse_bad

logger = logging.getLogger(__name__)

TEMPERATURE = 0.1
"""Of student and teacher (TEMI, main_args.py)."""

BETA = 0.6
"""Exponent of the joint probability (TEMI, README.md)."""

SIMILARITIES = 2**24
"""Similarities held at once in the search for neighbours: 64 MB."""

# of the average class probabilities (TEMI, losses/multihead_losses.py)
_PRIOR_DECAY = 0.9
# TEMI's 0.996 would follow too slowly for so few steps
_TEACHER_DECAY = 0.95
# AdamW; a linear warm-up over a tenth of the steps, then a cosine to 0 (decay: TEMI, main_args.py)
_LEARNING_RATE = 2e-2
_WARMUP = 0.1
_WEIGHT_DECAY = 1e-4
_PAIRS_PER_STEP = 512
# of the classifier that learns from the consensus: one layer, so that few steps do
_SELF_TRAINING_STEPS = 300
_SELF_TRAINING_RATE = 1e-2
_ROWS_PER_STEP = 512
_SMOOTHING = 0.1
# rows that are clustered again to measure the confidence
_RETRAINED = 4096
# passes of k-means for each head's start
_START_PASSES = 10

# Shapes below: N rows, D their width, H heads, C classes of each.


def nearest_neighbours(rows: Tensor, count: int) -> Tensor:
    """The rows of highest cosine of each row (N, D) of length 1: (N, count) int64, best first.

    A row is not its own neighbour.
    """
    found = []
    block = max(1, SIMILARITIES // len(rows))
    for start in bars.tqdm(range(0, len(rows), block), desc="neighbours", unit="block"):
        part = rows[start : start + block]
        similarity = products(part, rows)
        own = torch.arange(len(part), device=rows.device)
        similarity[own, own + start] = -torch.inf
        found.append(similarity.topk(count, dim=1).indices)
    return torch.cat(found)


def pair_losses(student: Tensor, teacher: Tensor, prior: Tensor) -> Tensor:
    """The loss of each head (H,): the negative weighted pointwise mutual information of pairs.

    With the probabilities q of the student, p of the teacher, and the prior class probabilities r,
    a pair (x, x') costs

        -w(x, x') / 2 * (log sum_c (q_c(x) p_c(x'))^beta / r_c + the same with x and x' exchanged)

    and weighs w(x, x') = sum_c p_c(x) p_c(x'), the mean over all heads: how likely the teachers
    hold the two for one kind (TEMI, losses/multihead_losses.py).

    Args:
        student, teacher: log probabilities (H, 2 n, C) of n rows followed by their n partners; the
            teacher's without gradient.
        prior: (H, 1, C).
    """
    first, second = teacher.chunk(2, dim=1)
    weight = (first + second).exp().sum(2).mean(0).repeat(2)  # (2 n,)
    swapped = torch.cat([second, first], dim=1)
    information = (BETA * (student + swapped) - prior.log()).logsumexp(2)  # (H, 2 n)
    return -(weight * information).mean(1)


def train_prototypes(
    points: Tensor, neighbours: Tensor, starts: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The teacher's prototypes (H, C, D) after training, and the heads' last losses (H,).

    Args:
        points: standardised rows of length 1 (N, D).
        neighbours: of each row (N, k).
        starts: the prototypes to start from (H, C, D).
        steps: of `_PAIRS_PER_STEP` pairs.
    """
    student = starts.clone().requires_grad_()
    teacher = starts.clone()
    prior = points.new_full((len(starts), 1, starts.shape[1]), 1 / starts.shape[1])

    optimiser = torch.optim.AdamW([student], _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    warm = max(1, round(_WARMUP * steps))
    rise = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / warm, total_iters=warm)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    last = points.new_zeros(len(starts))
    tail = max(1, steps // 10)
    for step in bars.tqdm(range(steps), desc="cluster heads", unit="step"):
        # rows, and one of the neighbours of each
        rows = torch.randint(len(points), (_PAIRS_PER_STEP,), generator=generator)
        ranks = torch.randint(neighbours.shape[1], (_PAIRS_PER_STEP,), generator=generator)
        rows = rows.to(points.device)
        partners = neighbours[rows, ranks.to(points.device)]
        pair = points[torch.cat([rows, partners])]

        with torch.no_grad():
            theirs = class_logits(pair, teacher, TEMPERATURE).log_softmax(2)
            prior.lerp_(theirs.exp().mean(1, keepdim=True), 1 - _PRIOR_DECAY)
        losses = pair_losses(class_logits(pair, student, TEMPERATURE).log_softmax(2), theirs, prior)

        # the heads share no parameter: each gets its own loss's gradient
        optimiser.zero_grad()
        losses.sum().backward()
        optimiser.step()
        rise.step()
        fall.step()

        with torch.no_grad():
            teacher.lerp_(student, 1 - _TEACHER_DECAY)
            if step >= steps - tail:
                last += losses.detach() / tail
    return teacher, last


def surest(labels: Tensor, confidence: Tensor, share: float) -> Tensor:
    """Which rows (N,) are among the surest of their group: `share` of it, one row at least."""
    order = confidence.argsort(descending=True, stable=True)
    # group by group, the surest first
    order = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]
    return rank < (share * sizes[labels]).ceil()


def self_trained(
    rows: Tensor, heads: PrototypeHeads, share: float, generator: torch.Generator
) -> PrototypeHeads:
    """One head in place of all, trained on their consensus (ICCE's last stage).

    The groups of the surest rows are its labels. What the heads hold for one group by different
    borders, one border has to explain: rows that they were not sure of often change their group.

    Args:
        rows: of length 1 (N, D).
        heads: aligned.
        share: of each group's rows, the surest first.
    """
    labels, confidence = heads.assign(rows, TEMPERATURE)
    kept = surest(labels, confidence, share)
    points = standardised(rows[kept], heads.mean, heads.scale)
    # a group that has no row gets no class
    groups, classes = labels[kept].unique(return_inverse=True)

    sums = points.new_zeros(len(groups), points.shape[1]).index_add_(0, classes, points)
    student = F.normalize(sums, dim=1).requires_grad_()
    optimiser = torch.optim.AdamW([student], _SELF_TRAINING_RATE, weight_decay=_WEIGHT_DECAY)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _SELF_TRAINING_STEPS)
    for _ in bars.tqdm(range(_SELF_TRAINING_STEPS), desc="self-training", unit="step"):
        picks = torch.randint(len(points), (_ROWS_PER_STEP,), generator=generator).to(rows.device)
        logits = class_logits(points[picks], student[None], TEMPERATURE)[0]
        loss = F.cross_entropy(logits, classes[picks], label_smoothing=_SMOOTHING)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        fall.step()

    best = heads.losses.min()[None]
    return PrototypeHeads(student.detach()[None], heads.mean, heads.scale, groups[None], best)


def check_training(count: int, num_clusters: int, **settings: int) -> None:
    """A ValueError unless heads can tell that many groups apart among `count` rows.

    Every setting has to be at least 1; ImportError where SciPy is missing.
    """
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 2 <= num_clusters <= count:
        raise ValueError(
            f"num_clusters={num_clusters} must lie between 2 and the {count} rows to cluster: "
            "cluster heads tell groups apart; for one group take k-means"
        )
    if not is_scipy_available():
        raise ImportError("cluster heads need SciPy to agree on one grouping: pip install scipy")


def train_heads(
    features: Tensor,
    num_clusters: int,
    *,
    heads: int = 8,
    neighbours: int = 50,
    steps: int = 300,
    seed: int = 0,
    refits: int = 4,
    self_training: float = 0.8,
) -> Clustering:
    """Train cluster heads on features and group the rows by what they agree on.

    The search for neighbours takes 2 N^2 D operations; 10^5 rows of width 384 took under 4 minutes
    of one core, most of it that search. Time and memory of the rest grow with `heads`, K and
    `steps`. On a CPU the result is a pure function of the arguments. `refits` more trainings, of
    4096 rows at most, tell how far the groups can be trusted, as in `kmeans`.

    Args:
        features: (N, D), clustered where it is; L2-normalised first, as for `kmeans`.
        num_clusters: K, from 2 to N.
        heads: trained at once, each from a k-means start of its own.
        neighbours: of each row, from among which its partner is drawn at each step; at most half
            an average group's rows.
        steps: of `_PAIRS_PER_STEP` pairs.
        seed: all random choices.
        refits: second trainings to calibrate the confidence by; 0 for none: then the confidence is
            the classifier's, or the consensus' probability.
        self_training: share of each group's surest rows that train the last classifier, 0 to 1; 0
            for the consensus of the heads itself.

    Returns:
        A `Clustering` with `heads`: its confidence is calibrated as in `kmeans`, its centroids
        are the directions of the mean row of each group, zero for an empty one. A warning tells
        how many groups are empty, where some are.

    Raises:
        ValueError: when K is not between 2 and N, a row holds NaN or infinity, or another argument
            is impossible.
        ImportError: where SciPy is missing.
    """
    begin = time.perf_counter()
    rows = prepared(features, spherical=True).float()
    check_training(len(rows), num_clusters, heads=heads, neighbours=neighbours, steps=steps)
    if refits < 0:
        raise ValueError(f"refits={refits} must be at least 0")
    if not 0 <= self_training <= 1:
        raise ValueError(f"self_training={self_training} must lie between 0 and 1")
    refuse_bad(bad_rows(rows), len(rows))

    mean = rows.mean(0)
    scale = rows.std(0) + 1e-6
    points = standardised(rows, mean, scale)
    starts = [_start(points, num_clusters, heads * seed + head) for head in range(heads)]
    prototypes = torch.stack(starts).to(points)
    half_a_group = max(1, len(rows) // (2 * num_clusters))
    nearby = nearest_neighbours(rows, min(neighbours, half_a_group))
    generator = torch.Generator().manual_seed(seed)
    trained, losses = train_prototypes(points, nearby, prototypes, steps, generator)

    own = torch.arange(num_clusters, device=rows.device).repeat(heads, 1)
    agreed = PrototypeHeads(trained, mean, scale, own, losses).aligned(rows, TEMPERATURE)
    if self_training:
        agreed = self_trained(rows, agreed, self_training, generator)
    groups = grouped(rows, agreed, num_clusters)
    if refits:
        again = partial(
            train_heads,
            num_clusters=num_clusters,
            heads=heads,
            neighbours=neighbours,
            steps=steps,
            refits=0,
            self_training=self_training,
        )
        groups = _calibrated(groups, rows, refits, seed, again)

    # second trainings say nothing
    if refits == 0:
        return groups
    facts = (heads, len(rows), num_clusters, time.perf_counter() - begin)
    logger.info("%d cluster heads on %d rows, %d groups: %.1f s", *facts)
    _warn_of_empty(groups.counts)
    return groups


def _calibrated(
    groups: Clustering, rows: Tensor, refits: int, seed: int, train: Callable[..., Clustering]
) -> Clustering:
    """The same groups of rows (N, D) with a confidence measured by second trainings."""
    num_clusters = len(groups.centroids)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(rows), generator=generator)
    picks = picks[: max(_RETRAINED, 16 * num_clusters)]
    sample = rows[picks.to(rows.device)]

    def again(part: Tensor, own_seed: int) -> Tensor:
        return train(part, seed=own_seed).assign(sample)[0]

    seconds = second_clusterings(sample, num_clusters, again, refits, seed, resample=False)
    labels = groups.assignments
    log_odds = groups.confidence.logit()
    shares = agreement(labels[picks], seconds, num_clusters)
    calibration = fitted(labels[picks], log_odds[picks], shares, num_clusters)
    confidence = calibration.confidence(labels, log_odds)
    return replace(groups, confidence=confidence, calibration=calibration)


def _warn_of_empty(counts: Tensor) -> None:
    """Tell how many groups have no row, where some have none."""
    empty = int((counts == 0).sum())
    if empty:
        logger.warning(
            "%d of %d groups are empty: the heads found no more in %d rows; ask for fewer",
            empty,
            len(counts),
            int(counts.sum()),
        )


def _start(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """The centroids of a short k-means, from which one head starts (C, D)."""
    return kmeans(
        points, num_clusters, runs=1, iterations=_START_PASSES, seed=seed, refits=0
    ).centroids


def grouped(rows: Tensor, heads: PrototypeHeads, num_clusters: int) -> Clustering:
    """The `Clustering` of rows (N, D) of length 1 by aligned heads."""
    labels, confidence = heads.assign(rows, TEMPERATURE)
    sums = rows.new_zeros(num_clusters, rows.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, rows.double())
    centroids = F.normalize(sums, dim=1).float()

    inertia = float(own_distances(rows, centroids, labels).sum(dtype=torch.float64))
    return Clustering(
        labels.cpu(),
        centroids.cpu(),
        confidence.cpu(),
        inertia,
        spherical=True,
        temperature=TEMPERATURE,
        heads=heads.to(torch.device("cpu")),
    )

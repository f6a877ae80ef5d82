"""How many groups? A proposal with an interval and its evidence, or "no clear answer".

    from mim_refiner_hf.clustering import propose_num_clusters
    proposal = propose_num_clusters(features)               # features (N, D)
    print(proposal.num_clusters, proposal.interval, proposal.clear, proposal.reason)

For each number k from 2 to 100, first coarsely and then around the best, the rows are grouped by
k-means. The best k is the one whose groups both come back when they are learnt from other rows
(stability) and lie apart (silhouette): their product is the score. It counts as clear only if one
normal cloud of the same variances, grouped alike, scores much lower, and if no other range of k
scores as high. How often that is right: benchmarks/results/cluster-count.md. The inertia's elbow
and, where umap-learn is installed, the silhouette after UMAP are evidence to look at; they do not
decide.

This file travels with saved models: it imports only torch and its flat neighbours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .k_means import kmeans
from .lloyd import best_centroids, membership
from .merging import cut_tree, merge_tree
from .row_batches import Rows, bad_rows, refuse_bad

# principal components for k-means, and for the silhouette
_COMPONENTS = 64
_FEW_COMPONENTS = 16
# after UMAP the silhouette follows the true quality well (Lowe et al., arXiv 2406.02465)
_UMAP_DIMENSIONS = 10
# restarts and full passes of k-means
_RUNS = 2
_PASSES = 6
# pairs of disjoint halves whose groupings are compared
_PAIRS = 3
# all pairs of so many rows are compared for the silhouette
_SILHOUETTE_ROWS = 1500
# rows without which there is no answer; the largest number of groups that is tried
_FEWEST_ROWS = 20
_MOST_GROUPS = 100
# rows per group, on average, below which no number is tried
_PER_GROUP = 10
# share of the best score from which another number is as good
_NEAR = 0.9
# clear: the least stability, the least score over the cloud's, the widest interval (high / low)
_STABLE = 0.8
_ABOVE_CLOUD = 1.4
_WIDEST = 1.5

Entry = dict[str, float]
"""What was measured for one number of groups, see `Proposal.evidence`."""


@dataclass(frozen=True)
class Proposal:
    """What the evidence says about the number of groups.

    Attributes:
        num_clusters: the best guess; None when there is none.
        interval: lowest and highest number that the evidence does not tell from the best guess.
        clear: whether the evidence supports the guess; when False, `reason` says why not.
        reason: one sentence for the user.
        evidence: one entry per number tried, ascending:
            `k`, the number;
            `stability` (-1 to 1): agreement of groupings learnt from disjoint halves;
            `silhouette` (-1 to 1) of all features, `silhouette_pca` of 16 principal components, and
            with umap-learn `silhouette_umap`;
            `inertia`: share of the variance inside the groups;
            `elbow`: how sharply it bends, the fall of log inertia over log k before, less that
            after;
            `score`: stability * silhouette_pca;
            of the best guess also `cloud_stability` and `cloud_silhouette_pca`, of one normal cloud
            with the same variances.
    """

    num_clusters: int | None
    interval: tuple[int, int] | None
    clear: bool
    reason: str
    evidence: list[Entry]


def adjusted_rand(first: Tensor, second: Tensor) -> float:
    """Agreement of two groupings (n,) of the same rows: 1 when equal, about 0 by chance.

    The adjusted Rand index (Hubert & Arabie 1985).
    """
    groups = int(second.max()) + 1
    cells = (int(first.max()) + 1) * groups
    table = (first * groups + second).bincount(minlength=cells).view(-1, groups).double()

    # pairs of rows that lie together in both, in the first, in the second, and all pairs
    both = _pairs_in(table)
    one = _pairs_in(table.sum(1))
    two = _pairs_in(table.sum(0))
    every = _pairs_in(table.sum())
    chance = one * two / every
    highest = (one + two) / 2
    return 1.0 if highest == chance else (both - chance) / (highest - chance)


def _pairs_in(counts: Tensor) -> float:
    """Pairs of rows within groups of these sizes."""
    return float((counts * (counts - 1) / 2).sum())


def silhouette(distances: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Mean silhouette, -1 to 1, of groups (n,) from all mutual distances (n, n).

    How much nearer a row is to its own group than to the nearest other one (Rousseeuw 1987).
    """
    member = F.one_hot(labels, num_clusters).float()
    counts = member.sum(0)
    sums = distances @ member  # (n, K)

    # mean distance to the others of the own group, and to the nearest of the other groups
    own = sums.gather(1, labels[:, None])[:, 0] / (counts[labels] - 1).clamp_min(1)
    means = sums / counts.clamp_min(1)
    other = means.masked_fill(member.bool() | (counts == 0), torch.inf).min(1).values

    values = (other - own) / torch.maximum(other, own).clamp_min(1e-12)
    return float(torch.where((counts[labels] > 1) & other.isfinite(), values, 0.0).mean())


class Grouper:
    """k-means of the same points (n, D) into any number of groups up to `most`.

    Ward's tree over `most` small groups is cut, and the result improved.
    """

    def __init__(self, points: Tensor, most: int, seed: int) -> None:
        self.points = points
        self.rows = Rows(points, spherical=False)

        self.small = kmeans(
            points,
            most,
            runs=_RUNS,
            iterations=_PASSES,
            seed=seed,
            spherical=False,
            refits=0,
        )
        self.tree = merge_tree(self.small)
        self.limit = 1e-4 * float(points.var(0).mean())

    def __call__(self, num_clusters: int) -> Tensor:
        """Centroids (K, D)."""
        labels = cut_tree(self.tree, num_clusters)[self.small.assignments]
        member = F.one_hot(labels, num_clusters).float()  # (n, K)
        starts = member.T @ self.points / member.sum(0)[:, None].clamp_min(1)
        return best_centroids(self.rows, starts, _PASSES, self.limit)


class Measures:
    """The evidence on any number of groups of the centred points (n, D), up to `most`.

    Silhouettes are measured in `spaces`, each of its own width (n, any).
    """

    def __init__(self, points: Tensor, spaces: dict[str, Tensor], most: int, seed: int) -> None:
        self.points = points
        self.grouper = Grouper(points, most, seed)
        self.distances = {}
        for name, rows in spaces.items():
            few = rows[:_SILHOUETTE_ROWS]
            self.distances[name] = torch.cdist(few, few)

        self.pairs = []
        for pair in range(_PAIRS):
            generator = torch.Generator().manual_seed(seed + pair)
            order = torch.randperm(len(points), generator=generator)
            halves = points[order].tensor_split(2)
            self.pairs.append([Grouper(half, most, seed) for half in halves])

    def __call__(self, num_clusters: int) -> Entry:
        """The entry of `Proposal.evidence`, without what needs other entries."""
        labels, _, distances = membership(self.points, self.grouper(num_clusters), 1.0)
        entry = {"k": num_clusters, "stability": self.stability(num_clusters)}
        for name, mutual in self.distances.items():
            entry[name] = silhouette(mutual, labels[: len(mutual)], num_clusters)
        entry["inertia"] = float(distances.sum() / self.points.square().sum())
        entry["score"] = max(0.0, entry["stability"]) * max(0.0, entry["silhouette_pca"])
        return entry

    def stability(self, num_clusters: int) -> float:
        """Mean agreement of two groupings of all points, each learnt from another half of them.

        Lange et al. 2004.
        """
        agreements = []
        for one, two in self.pairs:
            first, _, _ = membership(self.points, one(num_clusters), 1.0)
            second, _, _ = membership(self.points, two(num_clusters), 1.0)
            agreements.append(adjusted_rand(first, second))
        return sum(agreements) / len(agreements)


def unit_rows(features: Tensor, seed: int, max_samples: int) -> Tensor:
    """Up to `max_samples` random rows (n, D), fp32 on the CPU: L2-normalised, then centred."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    picked = features[order[:max_samples].to(features.device)]
    rows = F.normalize(picked.detach().float().cpu(), dim=1)
    refuse_bad(bad_rows(rows), len(rows))
    return rows - rows.mean(0)


def principal_components(rows: Tensor, dimensions: int) -> Tensor:
    """The centred rows (n, D) in their main directions (n, `dimensions` or D), the widest first."""
    directions = torch.linalg.eigh(rows.T.double() @ rows.double()).eigenvectors.flip(1)
    return rows @ directions[:, :dimensions].float()


def umap_space(
    points: Tensor, dimensions: int, *, neighbours: int, min_dist: float, seed: int
) -> Tensor | None:
    """The points (n, D) after UMAP by their Euclidean distances (n, dimensions).

    None where umap-learn, an extra of this package, is not installed.
    """
    try:
        from umap import UMAP
    except ImportError:
        return None

    reducer = UMAP(
        n_neighbors=min(neighbours, len(points) - 1),
        n_components=dimensions,
        min_dist=min_dist,
        random_state=seed,
        n_jobs=1,
    )
    return torch.from_numpy(reducer.fit_transform(points.numpy())).float()


def coarse(most: int) -> list[int]:
    """2 to 10, then in steps of about a quarter, up to `most`."""
    numbers = list(range(2, min(10, most) + 1))
    while numbers[-1] < most:
        numbers.append(min(most, math.ceil(1.22 * numbers[-1])))
    return numbers


def search(measure: Callable[[int], Entry], numbers: list[int], refine: bool) -> list[Entry]:
    """Entries of all `numbers`; to `refine` also of those left out on either side of the best."""
    entries = {k: measure(k) for k in numbers}
    if refine:
        place = max(range(len(numbers)), key=lambda i: entries[numbers[i]]["score"])
        low = numbers[max(0, place - 1)]
        high = numbers[min(len(numbers) - 1, place + 1)]
        for k in range(low + 1, high):
            if k not in entries:
                entries[k] = measure(k)
    return [entries[k] for k in sorted(entries)]


def add_elbows(evidence: list[Entry]) -> None:
    """Set `elbow` of all but the outermost entries, which have none."""
    for before, entry, after in zip(evidence, evidence[1:], evidence[2:], strict=False):
        entry["elbow"] = _fall(before, entry) - _fall(entry, after)


def _fall(one: Entry, two: Entry) -> float:
    """How steeply the inertia falls from one number of groups to the next: log over log."""
    falls = math.log(max(one["inertia"], 1e-12) / max(two["inertia"], 1e-12))
    return falls / math.log(two["k"] / one["k"])


def silhouette_spaces(rows: Tensor, points: Tensor, seed: int) -> dict[str, Tensor]:
    """Where silhouettes are measured: all features, a few components, and UMAP if installed."""
    spaces = {"silhouette": rows, "silhouette_pca": points[:, :_FEW_COMPONENTS]}
    few = points[:_SILHOUETTE_ROWS]
    embedded = umap_space(few, _UMAP_DIMENSIONS, neighbours=30, min_dist=0.0, seed=seed)
    if embedded is not None:
        spaces["silhouette_umap"] = embedded
    return spaces


def add_cloud(best: Entry, points: Tensor, most: int, seed: int) -> None:
    """Set `cloud_*`: the same on a normal cloud of the same variances, which has no groups."""
    cloud = torch.randn(points.shape, generator=torch.Generator().manual_seed(seed)) * points.std(0)
    spaces = {"silhouette_pca": cloud[:, :_FEW_COMPONENTS]}
    alike = Measures(cloud, spaces, most, seed)(int(best["k"]))
    best["cloud_stability"] = alike["stability"]
    best["cloud_silhouette_pca"] = alike["silhouette_pca"]


def judge(evidence: list[Entry], best: Entry) -> tuple[tuple[int, int], str]:
    """The interval, and what speaks against the best guess ("" for nothing)."""
    near = [int(entry["k"]) for entry in evidence if entry["score"] >= _NEAR * best["score"]]
    low, high = min(near), max(near)
    cloud = max(0.0, best["cloud_stability"]) * max(0.0, best["cloud_silhouette_pca"])

    against = ""
    if best["stability"] < _STABLE:
        agreement = f"{best['stability']:.2f}, of 1"
        against = f"groups learnt from other halves of the rows agree only to {agreement}"
    elif best["score"] < _ABOVE_CLOUD * cloud:
        against = "one cloud without groups, of the same variances, scores nearly as high"
    elif high > max(_WIDEST * low, low + 1):
        against = f"{low} to {high} groups are as stable and as separate as {best['k']:.0f}"
    return (low, high), against


def propose_num_clusters(
    features: Tensor,
    *,
    candidates: Sequence[int] | None = None,
    seed: int = 0,
    max_samples: int = 5000,
) -> Proposal:
    """Propose a number of groups for `features` (N, D).

    Args:
        candidates: the numbers to choose from; None for 2 to 100, but at least ten rows per group.
        seed: all random choices.
        max_samples: rows drawn to decide on, at random.

    Raises:
        ValueError: when a row holds NaN or infinity, or a candidate is not between 2 and a quarter
            of the rows.
    """
    rows = unit_rows(features, seed, max_samples)
    if len(rows) < _FEWEST_ROWS:
        reason = f"{len(rows)} rows are too few to tell; it takes {_FEWEST_ROWS}"
        return Proposal(None, None, False, reason, [])

    if candidates is None:
        numbers = coarse(max(2, min(_MOST_GROUPS, len(rows) // _PER_GROUP)))
    else:
        numbers = sorted(set(candidates))
    if not numbers or not 2 <= numbers[0] <= numbers[-1] <= len(rows) // 4:
        raise ValueError(
            f"candidates={candidates} must be numbers from 2 to {len(rows) // 4}, "
            f"a quarter of the {len(rows)} rows"
        )

    points = principal_components(rows, _COMPONENTS)
    if float(points.square().mean()) < 1e-12:
        return Proposal(None, None, False, "all rows are equal", [])

    measure = Measures(points, silhouette_spaces(rows, points, seed), numbers[-1], seed)
    evidence = search(measure, numbers, refine=candidates is None)
    add_elbows(evidence)
    best = max(evidence, key=lambda entry: entry["score"])
    num_clusters = int(best["k"])
    add_cloud(best, points, numbers[-1], seed)

    interval, against = judge(evidence, best)
    if best["score"] <= 0:
        reason = f"no number of groups is both stable and separate: {against}"
        return Proposal(None, None, False, reason, evidence)
    agreement = f"{best['stability']:.2f}, of 1, and lie apart"
    reason = against or f"groups learnt from other halves of the rows agree to {agreement}"
    return Proposal(num_clusters, interval, not against, reason, evidence)

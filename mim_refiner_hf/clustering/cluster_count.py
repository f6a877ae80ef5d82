"""How many groups? A proposal with an interval and its evidence, or "no clear answer".

    from mim_refiner_hf.clustering import draw_proposal, propose_num_clusters
    proposal = propose_num_clusters(features)                         # features (N, D)
    print(proposal.num_clusters, proposal.interval, proposal.clear, proposal.reason)
    draw_proposal(proposal, Path("count.png"))

For each number k from 2 to 100, first coarsely and then around the best, the rows are grouped by k-means. The best k is the one
whose groups both come back when they are learnt from other rows (stability) and lie apart (silhouette): their product is the
score. It counts as clear only if one normal cloud of the same variances, grouped alike, scores much lower, and if no other range
of k scores as high. How often that is right: benchmarks/results/cluster-count.md. The inertia's elbow and, where umap-learn is
installed, the silhouette after UMAP are evidence to look at; they do not decide.

This file travels with saved models: it needs torch only, and `clustering.py` and `lloyd.py` beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .k_means import cut_tree, kmeans, merge_tree
from .lloyd import Rows, bad_rows, best_centroids, membership, refuse_bad

COMPONENTS, FEW_COMPONENTS = 64, 16  # principal components for k-means and for the silhouette
UMAP_DIMENSIONS = (
    10  # after UMAP the silhouette follows the true quality well (Lowe et al., arXiv 2406.02465)
)
RUNS, PASSES = 2, 6  # restarts and full passes of k-means
PAIRS = 3  # pairs of disjoint halves whose groupings are compared
SILHOUETTE_ROWS = 1500  # all pairs of these rows are compared
FEWEST, MOST = (
    20,
    100,
)  # rows without which there is no answer; the largest number of groups that is tried
PER_GROUP = 10  # rows per group, on average, below which no number is tried
NEAR = 0.9  # share of the best score from which another number is as good
STABLE, ABOVE_CLOUD, WIDEST = (
    0.8,
    1.4,
    1.5,
)  # clear: least stability; least score over the cloud's; widest interval, high / low
Entry = dict[str, float]


@dataclass(frozen=True)
class Proposal:
    """What the evidence says about the number of groups.

    Attributes:
        num_clusters: the best guess; None when there is none.
        interval: lowest and highest number that the evidence does not tell from the best guess.
        clear: whether the evidence supports the guess; when False, `reason` says why not.
        reason: one sentence for the user.
        evidence: one entry per number tried, ascending: `k`; `stability` (-1 to 1: agreement of groupings learnt from disjoint
            halves); `silhouette` of all features and `silhouette_pca` of 16 principal components (-1 to 1), with umap-learn also
            `silhouette_umap`; `inertia` (share of the variance inside the groups); `elbow` (how sharply it bends: fall of
            log inertia over log k before, less that after); `score` (stability * silhouette_pca). The entry of the best guess
            also holds `cloud_stability` and `cloud_silhouette_pca`, of one normal cloud with the same variances.
    """

    num_clusters: int | None
    interval: tuple[int, int] | None
    clear: bool
    reason: str
    evidence: list[Entry]


def adjusted_rand(first: Tensor, second: Tensor) -> float:
    """Agreement of two groupings (n,) of the same rows: 1 when equal, about 0 by chance (Hubert & Arabie 1985)."""
    groups = int(second.max()) + 1
    table = (
        (first * groups + second)
        .bincount(minlength=(int(first.max()) + 1) * groups)
        .view(-1, groups)
        .double()
    )
    together, one, two, every = (
        float((n * (n - 1) / 2).sum()) for n in (table, table.sum(1), table.sum(0), table.sum())
    )
    chance, highest = one * two / every, (one + two) / 2
    return 1.0 if highest == chance else (together - chance) / (highest - chance)


def silhouette(distances: Tensor, labels: Tensor, num_clusters: int) -> float:
    """Mean silhouette, -1 to 1, of groups (n,) from all mutual distances (n, n) (Rousseeuw 1987)."""
    member = F.one_hot(labels, num_clusters).float()
    counts = member.sum(0)
    sums = distances @ member  # (n, K)
    own = sums.gather(1, labels[:, None])[:, 0] / (counts[labels] - 1).clamp_min(1)
    other = (
        (sums / counts.clamp_min(1))
        .masked_fill(member.bool() | (counts == 0), torch.inf)
        .min(1)
        .values
    )
    values = (other - own) / torch.maximum(other, own).clamp_min(1e-12)
    return float(torch.where((counts[labels] > 1) & other.isfinite(), values, 0.0).mean())


class Grouper:
    """k-means of the same points (n, D) into any number of groups: Ward's tree over many small ones, cut and improved."""

    def __init__(self, points: Tensor, most: int, seed: int) -> None:
        self.points, self.rows = points, Rows(points, spherical=False)
        self.small = kmeans(points, most, runs=RUNS, iterations=PASSES, seed=seed, spherical=False)
        self.tree = merge_tree(self.small)
        self.limit = 1e-4 * float(points.var(0).mean())

    def __call__(self, num_clusters: int) -> Tensor:
        """Centroids (K, D)."""
        member = F.one_hot(
            cut_tree(self.tree, num_clusters)[self.small.assignments], num_clusters
        ).float()  # (n, K)
        starts = member.T @ self.points / member.sum(0)[:, None].clamp_min(1)
        return best_centroids(self.rows, starts[None], PASSES, self.limit)


class Measures:
    """The evidence on any number of groups of the points (n, D), up to `most`; silhouettes in `spaces` (n, any)."""

    def __init__(self, points: Tensor, spaces: dict[str, Tensor], most: int, seed: int) -> None:
        self.points, self.grouper, self.pairs = points, Grouper(points, most, seed), []
        self.spaces = {
            name: torch.cdist(rows[:SILHOUETTE_ROWS], rows[:SILHOUETTE_ROWS])
            for name, rows in spaces.items()
        }
        for pair in range(PAIRS):
            order = torch.randperm(
                len(points), generator=torch.Generator().manual_seed(seed + pair)
            )
            self.pairs.append([Grouper(half, most, seed) for half in points[order].tensor_split(2)])

    def __call__(self, num_clusters: int) -> Entry:
        """The entry of `Proposal.evidence`, without what needs other entries."""
        labels, _, distances = membership(self.points, self.grouper(num_clusters), 1.0)
        entry = {"k": num_clusters, "stability": self.stability(num_clusters)}
        for name, mutual in self.spaces.items():
            entry[name] = silhouette(mutual, labels[: len(mutual)], num_clusters)
        entry["inertia"] = float(
            distances.sum() / self.points.square().sum()
        )  # the points are centred
        entry["score"] = max(0.0, entry["stability"]) * max(0.0, entry["silhouette_pca"])
        return entry

    def stability(self, num_clusters: int) -> float:
        """Mean agreement of two groupings of all points, each learnt from another half of them (Lange et al. 2004)."""
        found = [
            [membership(self.points, half(num_clusters), 1.0)[0] for half in pair]
            for pair in self.pairs
        ]
        return sum(adjusted_rand(*labels) for labels in found) / len(found)


def unit_rows(features: Tensor, seed: int, max_samples: int) -> Tensor:
    """Up to `max_samples` random rows (n, D), fp32 on the CPU: L2-normalised, then centred."""
    picked = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[
        :max_samples
    ]
    rows = F.normalize(features[picked.to(features.device)].detach().float().cpu(), dim=1)
    refuse_bad(bad_rows(rows), len(rows))
    return rows - rows.mean(0)


def principal_components(rows: Tensor, dimensions: int) -> Tensor:
    """The centred rows (n, D) in their main directions (n, `dimensions` or D), the widest first."""
    directions = torch.linalg.eigh(rows.T.double() @ rows.double()).eigenvectors.flip(1)
    return rows @ directions[:, :dimensions].float()


def umap_space(
    points: Tensor, dimensions: int, *, neighbours: int, min_dist: float, seed: int
) -> Tensor | None:
    """The points (n, D) after UMAP (n, dimensions), by their Euclidean distances; None where umap-learn is not installed."""
    try:
        from umap import UMAP
    except ImportError:  # an extra of this package
        return None
    neighbours = min(neighbours, len(points) - 1)
    reducer = UMAP(
        n_neighbors=neighbours,
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
        low, high = numbers[max(0, place - 1)], numbers[min(len(numbers) - 1, place + 1)]
        entries |= {k: measure(k) for k in range(low + 1, high) if k not in entries}
    return [entries[k] for k in sorted(entries)]


def add_elbows(evidence: list[Entry]) -> None:
    """Set `elbow` of all but the outermost entries, which have none."""
    for before, entry, after in zip(evidence, evidence[1:], evidence[2:], strict=False):
        falls = [
            math.log(max(one["inertia"], 1e-12) / max(two["inertia"], 1e-12))
            / math.log(two["k"] / one["k"])
            for one, two in ((before, entry), (entry, after))
        ]
        entry["elbow"] = falls[0] - falls[1]


def judge(evidence: list[Entry], best: Entry) -> tuple[tuple[int, int], str]:
    """The interval, and what speaks against the best guess ("" for nothing)."""
    near = [int(entry["k"]) for entry in evidence if entry["score"] >= NEAR * best["score"]]
    interval = (min(near), max(near))
    cloud = max(0.0, best["cloud_stability"]) * max(0.0, best["cloud_silhouette_pca"])
    if best["stability"] < STABLE:
        return (
            interval,
            f"groups learnt from other halves of the rows agree only to {best['stability']:.2f}, of 1",
        )
    if best["score"] < ABOVE_CLOUD * cloud:
        return interval, "one cloud without groups, of the same variances, scores nearly as high"
    if interval[1] > max(WIDEST * interval[0], interval[0] + 1):
        return (
            interval,
            f"{interval[0]} to {interval[1]} groups are as stable and as separate as {best['k']:.0f}",
        )
    return interval, ""


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
        ValueError: when a row holds NaN or infinity, or a candidate is not between 2 and a quarter of the rows.
    """
    rows = unit_rows(features, seed, max_samples)
    if len(rows) < FEWEST:
        return Proposal(
            None, None, False, f"{len(rows)} rows are too few to tell; it takes {FEWEST}", []
        )
    numbers = (
        coarse(max(2, min(MOST, len(rows) // PER_GROUP)))
        if candidates is None
        else sorted(set(candidates))
    )
    if not numbers or not 2 <= numbers[0] <= numbers[-1] <= len(rows) // 4:
        raise ValueError(
            f"candidates={candidates} must be numbers from 2 to {len(rows) // 4}, a quarter of the {len(rows)} rows"
        )
    points = principal_components(rows, COMPONENTS)
    if float(points.square().mean()) < 1e-12:
        return Proposal(None, None, False, "all rows are equal", [])
    spaces = {"silhouette": rows, "silhouette_pca": points[:, :FEW_COMPONENTS]}
    embedded = umap_space(
        points[:SILHOUETTE_ROWS], UMAP_DIMENSIONS, neighbours=30, min_dist=0.0, seed=seed
    )
    spaces |= {} if embedded is None else {"silhouette_umap": embedded}
    evidence = search(
        Measures(points, spaces, numbers[-1], seed), numbers, refine=candidates is None
    )
    add_elbows(evidence)
    best = max(evidence, key=lambda entry: entry["score"])
    num_clusters = int(best["k"])
    cloud = torch.randn(points.shape, generator=torch.Generator().manual_seed(seed)) * points.std(0)
    alike = Measures(cloud, {"silhouette_pca": cloud[:, :FEW_COMPONENTS]}, numbers[-1], seed)(
        num_clusters
    )
    best |= {f"cloud_{name}": alike[name] for name in ("stability", "silhouette_pca")}
    interval, against = judge(evidence, best)
    if best["score"] <= 0:
        return Proposal(
            None,
            None,
            False,
            f"no number of groups is both stable and separate: {against}",
            evidence,
        )
    found = f"groups learnt from other halves of the rows agree to {best['stability']:.2f}, of 1, and lie apart"
    return Proposal(num_clusters, interval, not against, against or found, evidence)


def draw_proposal(proposal: Proposal, path: Path) -> None:
    """Plot the evidence over the number of groups as a PNG, with the best guess and its interval; ValueError if there is none."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_proposal needs matplotlib: pip install matplotlib") from error
    if not proposal.evidence:
        raise ValueError(f"there is no evidence to draw: {proposal.reason}")
    figure = Figure(figsize=(12, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    silhouettes = [name for name in proposal.evidence[0] if name.startswith("silhouette")]
    panels = [
        ("stability", ["stability", "score"]),
        ("silhouette", silhouettes),
        ("inertia", ["inertia"]),
        ("elbow", ["elbow"]),
    ]
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            entries = [entry for entry in proposal.evidence if name in entry]
            axes.plot(
                [e["k"] for e in entries],
                [e[name] for e in entries],
                marker=".",
                label=name.replace("_", " "),
            )
        if proposal.num_clusters is not None and proposal.interval is not None:
            axes.axvspan(*proposal.interval, alpha=0.15)
            axes.axvline(proposal.num_clusters, linestyle="--", linewidth=1)
        axes.set(title=title, xlabel="number of groups", xscale="log")
        axes.legend(fontsize=7)
    verdict = (
        f"{proposal.num_clusters} groups"
        if proposal.clear
        else f"no clear answer (best guess: {proposal.num_clusters})"
    )
    figure.suptitle(f"{verdict}: {proposal.reason}", fontsize=10, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


__all__ = ["Proposal", "draw_proposal", "propose_num_clusters"]

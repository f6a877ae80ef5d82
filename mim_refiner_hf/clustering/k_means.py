"""Groups of features: k-means in memory or from disk, near-duplicates, new images.

    from mim_refiner_hf.clustering import ArrayBatches, Clustering, kmeans
    groups = kmeans(features, num_clusters=100)             # (N, D), fp32 or bf16, CPU or GPU
    groups.save(Path("groups.safetensors"))
    labels, confidence = Clustering.load(Path("groups.safetensors")).assign(new_features)

    rows = np.load("features.npy", mmap_mode="r")           # 10^7 x 768 stay on the disk
    rows = parquet_dataset.with_format("torch")["features"]
    rows = torch.from_file("rows.bf16", size=10**7 * 768, dtype=torch.bfloat16).view(-1, 768)
    share = rows[rank::world_size]                          # of each process under a launcher
    groups = kmeans(ArrayBatches(share), num_clusters=1000)

Every row is assigned and has a confidence; there is no bin for outliers. A `Clustering` also comes,
by another method, from `cluster_heads.train_heads`. This file travels with saved models: it imports
only torch, safetensors and its flat neighbours.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .confidence import Calibration, agreement, fitted, sample_size, second_clusterings
from .lloyd import WORTH_A_PASS, best_centroids, membership, own_distances, variance_between
from .prototype_heads import PrototypeHeads
from .row_batches import Batches, Rows, bad_rows, is_far, prepared, products, refuse_bad, survey
from .starts import good_start, start_size

# of a file; 1 and 2, of earlier versions, hold no calibration
_FORMAT = "mim_refiner_hf.clustering.3"
_FORMATS = ("mim_refiner_hf.clustering.1", "mim_refiner_hf.clustering.2", _FORMAT)
# before the names of the heads' tensors; of the groups' offsets of a calibration
_HEADS = "heads."
_OFFSETS = "calibration.offsets"

# Shapes below: N rows, D their width, K groups.


@dataclass(frozen=True, eq=False)
class Clustering:
    """K groups of N rows, and how to assign new ones. All tensors are on the CPU.

    Attributes:
        assignments: group of each row (N,) int64; in a job of several processes, of this process's
            rows.
        centroids: (K, D) fp32; of length 1 when `spherical`.
        confidence: (N,) in (0, 1]: with a `calibration`, the share of second clusterings, by
            another seed or from other rows, that would put such a row into the same group. Without
            one, the posterior probability of the own group, which is far too sure: softmax over
            `-||x - c_k||^2 / 2 / temperature`, which for rows and centroids of length 1 is cosine /
            temperature, that of K round normal distributions of equal weight and of variance
            `temperature`.
        inertia: sum of the squared distances of all rows (of all processes) to their centroids.
        spherical: rows are L2-normalised before anything else.
        temperature: `kmeans` measures it: the variance of the rows around their own centroids, per
            direction, within the space that the centroids span; only what happens there can move a
            row from one group to another.
        heads: cluster heads, which then assign the rows and tell the confidence in place of the
            centroids, at `temperature`.
        calibration: turns the posterior's odds into the confidence; measured by `kmeans` and
            `train_heads`, None in files of earlier versions.
    """

    assignments: Tensor
    centroids: Tensor
    confidence: Tensor
    inertia: float
    spherical: bool
    temperature: float = 0.1
    heads: PrototypeHeads | None = None
    calibration: Calibration | None = None

    @property
    def counts(self) -> Tensor:
        """Rows in each group (K,) int64.

        k-means leaves a group empty only where fewer than K rows differ from each other.
        """
        return self.assignments.bincount(minlength=len(self.centroids))

    def assign(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Groups (M,) int64 and confidence (M,) of new rows (M, D), on the CPU.

        Raises:
            ValueError: for rows of another width, or with NaN or infinity.
        """
        rows = self._rows(features)
        if self.heads is not None:
            labels, posterior = self.heads.to(rows.device).assign(rows, self.temperature)
            log_odds = posterior.logit()
        else:
            centroids = self.centroids.to(rows.device)
            middle = centroids.mean(0)
            if not self.spherical and is_far(middle, float(centroids.var(0, correction=0).sum())):
                rows = rows.float() - middle
                centroids = centroids - middle
            labels, log_odds, _ = membership(rows, centroids, self.temperature)
        return labels.cpu(), _confidence(self.calibration, labels, log_odds).cpu()

    def exemplars(self, features: Tensor, per_group: int = 9) -> list[list[int]]:
        """For every group the numbers of its rows nearest to the centroid, nearest first.

        Args:
            features: the N rows that were clustered, in the same order.
            per_group: how many of them, at most.

        Raises:
            ValueError: when these are not N rows of width D.
        """
        if len(features) != len(self.assignments):
            raise ValueError(
                f"features has {len(features)} rows, "
                f"but {len(self.assignments)} were clustered; pass the same ones"
            )
        rows = self._rows(features)
        centroids = self.centroids.to(rows.device)
        distances = own_distances(rows, centroids, self.assignments.to(rows.device)).cpu()

        # by group, then by distance
        order = distances.argsort(stable=True)
        order = order[self.assignments[order].argsort(stable=True)]
        return [members[:per_group].tolist() for members in order.split(self.counts.tolist())]

    def joined(self, groups: Tensor) -> "Clustering":
        """The same rows when group g is called `groups[g]` from now on; equal numbers join groups.

        The confidence stays: it is a lower bound, as groups that are now one counted as rivals.
        The inertia is exact, and an upper bound when `spherical`. Centroids of joined groups are
        the means over their rows, so that `assign` may move a row at a border; cluster heads add
        the probabilities.

        Args:
            groups: (K,) int64, numbers from 0 on; -1 leaves out a group that has no rows.
        """
        number = int(groups.max()) + 1
        member = F.one_hot(groups + 1, number + 1)[:, 1:].double().T  # (new, old)
        share = member * self.counts.double()
        means = share @ self.centroids.double() / share.sum(1, keepdim=True).clamp_min(1)
        centroids = means.float()
        if self.spherical:
            centroids = F.normalize(centroids, dim=1)

        moved = (self.centroids - centroids[groups]).double().square().sum(1)
        added = float(self.counts.double() @ moved)
        return replace(
            self,
            assignments=groups[self.assignments],
            centroids=centroids,
            inertia=self.inertia + added,
            heads=self.heads and self.heads.joined(groups),
            calibration=self.calibration and self.calibration.joined(groups, self.counts),
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {
            "assignments": self.assignments,
            "centroids": self.centroids,
            "confidence": self.confidence,
        }
        metadata = {
            "format": _FORMAT,
            "inertia": repr(self.inertia),
            "temperature": repr(self.temperature),
            "spherical": repr(self.spherical),
        }
        if self.heads is not None:
            tensors |= {_HEADS + name: tensor for name, tensor in vars(self.heads).items()}
        if self.calibration is not None:
            tensors[_OFFSETS] = self.calibration.offsets
            metadata["slope"] = repr(self.calibration.slope)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            save_file(contiguous, temporary, metadata=metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Clustering":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is damaged, or is something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; give one that Clustering.save wrote")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}); "
                "give a file that Clustering.save wrote"
            ) from error
        if metadata.get("format") not in _FORMATS:
            raise ValueError(
                f"{path} holds no clustering (format {metadata.get('format')}); "
                "give one that Clustering.save wrote"
            )

        offsets = tensors.pop(_OFFSETS, None)
        calibration = None if offsets is None else Calibration(float(metadata["slope"]), offsets)
        own = {}
        learnt = {}
        for name, tensor in tensors.items():
            if name.startswith(_HEADS):
                learnt[name.removeprefix(_HEADS)] = tensor
            else:
                own[name] = tensor
        return cls(
            **own,
            inertia=float(metadata["inertia"]),
            spherical=metadata["spherical"] == "True",
            temperature=float(metadata["temperature"]),
            heads=PrototypeHeads(**learnt) if learnt else None,
            calibration=calibration,
        )

    def _rows(self, features: Tensor) -> Tensor:
        """New rows as they were clustered, after all checks."""
        rows = prepared(features, self.spherical)
        width = self.centroids.shape[1]
        if rows.shape[1] != width:
            raise ValueError(
                f"features has width {rows.shape[1]}, but the groups were made of width {width}"
            )
        refuse_bad(bad_rows(rows), len(rows))
        return rows


def kmeans(
    features: Tensor | Batches,
    num_clusters: int,
    *,
    runs: int = 10,
    iterations: int = 50,
    tolerance: float = 1e-4,
    seed: int = 0,
    spherical: bool = True,
    initial: Tensor | None = None,
    refits: int = 8,
) -> Clustering:
    """k-means: restarts on a sample, then passes over all rows for the best of them.

    The sample is 4096 rows, or 40 per group if that is more, from 1000 groups on 20. The restarts
    begin with greedy k-means++; after every fourth pass over the sample the half of them with the
    higher inertia is dropped. More than 30 groups have fewer restarts, and then centroids are
    swapped for rows that serve better (`starts.swapped`). What is left goes on over all rows: first
    by strides that go farther than to the means (`lloyd.stride`), of many groups along the
    principal directions of the rows, which takes a fraction of the time; then by Lloyd's passes,
    until the inertia hardly falls.

    From `initial` every step is Lloyd's, and without `spherical` the result is scikit-learn's
    (`KMeans(algorithm="lloyd", n_init=1)`): its rule for stopping, and its repair: empty groups get
    the rows farthest from their own centroids.

    Then `refits` second clusterings of the same kind, of 16384 sampled rows or 16 per group, tell
    how far the groups can be trusted: all have another seed, three of four also learn from two
    thirds of these rows only (`confidence.py`).

    Args:
        features: (N, D), clustered where it is, by this process alone; or `Batches`, read once per
            pass: then a job of several processes clusters the rows of all together (all-reduce of
            sums, counts and inertia), and each gets its own rows' assignments. bf16 rows are
            multiplied in bf16 with fp32 sums on a GPU, and in fp32 on a CPU.
        num_clusters: K.
        runs: restarts for at most 30 groups; for more groups fewer, as they differ less and cost
            more: of 4096 rows or more 3 of 10 for 50 groups, one for 100.
        iterations: most passes over all rows; without `initial`, half of them strides.
        tolerance: stop when the squared shift of all centroids is at most this times the mean
            variance of a feature.
        seed: all random choices; they do not depend on the number of processes.
        spherical: rows and centroids of length 1, similarity is the cosine (Dhillon & Modha 2001).
        initial: centroids (K, D) to start from, in place of `runs` starts.
        refits: second clusterings to calibrate the confidence by; 0 for none: then the confidence
            is the posterior probability.

    Raises:
        ValueError: when K is not between 1 and N, a row holds NaN or infinity, values are too large
            or small to be squared in fp32, or another argument is impossible.
    """
    for name, value in (("runs", runs), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if refits < 0:
        raise ValueError(f"refits={refits} must be at least 0")
    again = partial(
        kmeans,
        num_clusters=num_clusters,
        runs=runs,
        iterations=iterations,
        tolerance=tolerance,
        spherical=spherical,
    )
    rows = Rows(features, spherical)
    sample, mean, variance = survey(rows, num_clusters, seed, start_size(num_clusters))
    if initial is not None:
        initial = _checked(initial, (num_clusters, sample.shape[1])).to(sample)
    if not spherical and is_far(mean, variance * len(mean)):
        begin = None if initial is None else initial - mean
        near = again(rows.around(mean), seed=seed, initial=begin, refits=refits)
        return replace(near, centroids=near.centroids + mean.cpu())

    limit = tolerance * variance
    if initial is not None:
        centroids = best_centroids(rows, prepared(initial, spherical), iterations, limit)
    else:
        strides = iterations // 2
        start = good_start(rows, sample, num_clusters, runs=runs, seed=seed, passes=strides)
        # passes over few groups cost little, and are what few restarts differ by
        worth = min(WORTH_A_PASS, 4e-6 * num_clusters)
        centroids = best_centroids(rows, start, iterations - strides, limit, worth=worth)
    temperature = variance_between(sample, centroids)
    if refits == 0 or num_clusters == 1:
        return _grouped(rows, centroids, temperature, None)

    # the same procedure once more, on rows that fit into memory
    some, _, _ = survey(rows, num_clusters, seed, sample_size(num_clusters))

    def second(part: Tensor, own_seed: int) -> Tensor:
        found = again(part, seed=own_seed, initial=initial, refits=0)
        return membership(some, found.centroids.to(some.device), 1.0)[0].cpu()

    resample = initial is not None
    seconds = second_clusterings(some, num_clusters, second, refits, seed, resample=resample)
    labels, log_odds, _ = (found.cpu() for found in membership(some, centroids, temperature))
    shares = agreement(labels, seconds, num_clusters)
    calibration = fitted(labels, log_odds, shares, num_clusters)
    return _grouped(rows, centroids, temperature, _of_first(rows, calibration))


def _of_first(rows: Rows, calibration: Calibration) -> Calibration:
    """The first process's, on all of them."""
    if rows.processes == 1:
        return calibration
    device = next(iter(rows)).device
    numbers = torch.cat([calibration.offsets, torch.tensor([calibration.slope])]).to(device)
    numbers = rows.of_first(numbers).cpu()
    return Calibration(float(numbers[-1]), numbers[:-1])


def _confidence(calibration: Calibration | None, labels: Tensor, log_odds: Tensor) -> Tensor:
    """Calibrated, or the posterior probability itself."""
    if calibration is None:
        return log_odds.sigmoid()
    return calibration.confidence(labels, log_odds)


def _checked(initial: Tensor, shape: tuple[int, int]) -> Tensor:
    """Centroids to start from; ValueError for another shape or values that are not finite."""
    if initial.shape == shape and bool(initial.isfinite().all()):
        return initial
    raise ValueError(
        f"initial has shape {tuple(initial.shape)}, "
        f"but must hold finite centroids {shape}, one row per group"
    )


def _grouped(
    rows: Rows, centroids: Tensor, temperature: float, calibration: Calibration | None
) -> Clustering:
    """The last pass: every row in the group of its nearest centroid."""
    # filled in place: small tensors kept from every batch would pin the memory of the large ones
    # that came between them
    labels = torch.empty(len(rows.batches), dtype=torch.int64)
    confidence = torch.empty(len(rows.batches))
    inertia = torch.zeros((), dtype=torch.float64, device=centroids.device)
    seen = 0
    for batch in rows:
        here = slice(seen, seen + len(batch))
        label, log_odds, distances = membership(batch, centroids, temperature)
        labels[here] = label
        confidence[here] = _confidence(calibration, label, log_odds)
        inertia += distances.sum(dtype=torch.float64)
        seen += len(batch)

    return Clustering(
        labels,
        centroids.cpu(),
        confidence,
        float(rows.over_processes(inertia)),
        rows.spherical,
        temperature,
        calibration=calibration,
    )


# --- near-duplicates -----------------------------------------------------------------------------


def near_duplicates(
    features: Tensor, threshold: float = 0.97, *, block: int = 2048
) -> list[list[int]]:
    """Groups of rows (N, D) linked by pairs of a cosine of at least `threshold`.

    Compares all pairs, `block` by `block` rows at a time (16 MB), on the features' device.

    Returns:
        Ascending row numbers, two or more per group.

    Raises:
        ValueError: for a threshold outside (0, 1], or rows with NaN or infinity.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be a cosine above 0 and at most 1")
    rows = prepared(features, spherical=True)
    refuse_bad(bad_rows(rows), len(rows))

    # of each row, in the end: the first row of its group
    parents = torch.arange(len(rows), device=rows.device)
    parts = rows.split(block)
    for i, left in enumerate(parts):
        for j in range(i, len(parts)):
            first, second = (products(left, parts[j]) >= threshold).nonzero(as_tuple=True)
            _join(parents, first + i * block, second + j * block)

    counts = parents.unique(return_counts=True)[1].tolist()
    groups = parents.argsort(stable=True).split(counts)
    return [group.tolist() for group in groups if len(group) > 1]


def _join(parents: Tensor, first: Tensor, second: Tensor) -> None:
    """Unite the groups of paired rows, in place: a root hangs below the smallest of its pairs."""
    while True:
        one = parents[first]
        two = parents[second]
        apart = one != two
        if not bool(apart.any()):
            return
        one = one[apart]
        two = two[apart]
        parents.scatter_reduce_(0, torch.maximum(one, two), torch.minimum(one, two), "amin")
        while not torch.equal(parents[parents], parents):
            parents.copy_(parents[parents])

"""k-NN classification of frozen features: the paper's protocol, on CPU or GPU.

    from mim_refiner_hf.evaluation import knn_accuracy
    knn_accuracy(train_x, train_y, test_x, test_y)           # k = 10, temperature 0.07

The features may be those of the last block, or of the last 4 blocks side by side (paper, table 13):

    found = extract_features(encoder, images, processor, blocks=range(20, 24))
    last4 = torch.cat(list(found.blocks.values()), dim=1)    # (N, 4 D)

Features are standardised with the TRAIN mean and unbiased standard deviation, L2-normalised, and compared by cosine; each of
the k neighbours votes for its class with weight `exp(similarity / temperature)`. The authors tuned k = 10 for plain MIM models
(MIM-Refiner, Sec. 5.2; `eval_knn_torchhub.py` of ml-jku/MIM-Refiner).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)  # of the grid
TEMPERATURES = (0.02, 0.07, 0.2)
SIMILARITIES_AT_ONCE = 2**24  # entries of one chunk's similarity matrix: 64 MiB in fp32


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (N, D) and (M, D) with the TRAIN mean and unbiased standard deviation + 1e-6 per channel."""
    mean = train.mean(dim=0)
    std = train.std(dim=0) + 1e-6
    return (train - mean) / std, (test - mean) / std


def check_knn_input(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: Sequence[int], temperature: Sequence[float]) -> None:
    """ValueError, in one sentence, for shapes, neighbours and temperatures that make no sense."""
    if train_x.dim() != 2 or test_x.dim() != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D) of one width, not {(*train_x.shape,)} and {(*test_x.shape,)}")
    if len(train_x) == 0 or len(test_x) == 0:
        raise ValueError(f"k-NN needs at least one training and one test row, not {len(train_x)} and {len(test_x)}")
    if train_y.shape != train_x.shape[:1]:
        raise ValueError(f"train_y must hold one label per training row ({len(train_x)}), not shape {(*train_y.shape,)}")
    if bool((train_y < 0).any()):
        raise ValueError("train_y has negative labels, but k-NN needs a class (0 or more) for every training row")
    if not k or min(k) < 1 or max(k) > len(train_x):
        raise ValueError(f"k={tuple(k)} must lie between 1 and the {len(train_x)} training rows")
    if not temperature or min(temperature) <= 0:
        raise ValueError(f"temperature={tuple(temperature)} must be positive (infinity for uniform votes)")


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: Sequence[int] = (10,),
    temperature: Sequence[float] = (0.07,),
) -> dict[tuple[int, float], Tensor]:
    """Predicted classes for every combination of `k` and `temperature`, from one pass over the similarities.

    Args:
        train_x: bank of features (N, D); standardise first for the paper's protocol. Rows are L2-normalised here.
        train_y: their classes (N,), int64, not negative.
        test_x: features to classify (M, D).
        k: numbers of neighbours, each at most N.
        temperature: softness of the votes; `float("inf")` for one vote per neighbour.

    Returns:
        {(k, temperature): classes (M,) int64 on the device of `test_x`}; ties go to the lowest class id.

    Raises:
        ValueError: for shapes, labels, neighbours or temperatures that do not fit.
    """
    check_knn_input(train_x, train_y, test_x, k, temperature)
    bank = F.normalize(train_x, dim=1).T
    num_classes = int(train_y.max()) + 1
    settings = [(neighbours, tau) for neighbours in k for tau in temperature]
    predicted: dict[tuple[int, float], list[Tensor]] = {setting: [] for setting in settings}
    chunk = max(1, SIMILARITIES_AT_ONCE // len(train_x))
    for start in range(0, len(test_x), chunk):
        rows = test_x[start : start + chunk]
        similarity, nearest = (F.normalize(rows, dim=1) @ bank).topk(max(k), dim=1)  # both (rows, max k), best first
        classes = train_y[nearest]
        for neighbours, tau in settings:
            # exp(s / tau) up to a factor per row, which no argmax sees, and which would overflow at a small tau
            votes = ((similarity[:, :neighbours] - similarity[:, :1]) / tau).exp()
            ballot = votes.new_zeros(len(rows), num_classes).scatter_add_(1, classes[:, :neighbours], votes)
            predicted[neighbours, tau].append(ballot.argmax(dim=1))
    return {setting: torch.cat(chunks) for setting, chunks in predicted.items()}


def knn_grid(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> dict[tuple[int, float], Tensor]:
    """`knn_predict` for all of `NEIGHBOURS` that the bank has, and all `TEMPERATURES`, in one pass; standardise first."""
    return knn_predict(train_x, train_y, test_x, k=[k for k in NEIGHBOURS if k <= len(train_x)], temperature=TEMPERATURES)


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int = 10, temperature: float = 0.07
) -> float:
    """Share (0 to 1) of the test rows that the paper's k-NN protocol classifies correctly; arguments as in `knn_predict`."""
    if test_y.shape != test_x.shape[:1]:
        raise ValueError(f"test_y must hold one label per test row ({len(test_x)}), not shape {(*test_y.shape,)}")
    train_x, test_x = standardise(train_x, test_x)
    predicted = knn_predict(train_x, train_y, test_x, k=(k,), temperature=(temperature,))[k, temperature]
    return (predicted == test_y).float().mean().item()


__all__ = ["knn_accuracy", "knn_grid", "knn_predict", "standardise"]

"""Linear erasure: a field of metadata is taken out of features, in closed form (LEACE).

    found = fit_eraser(features, values)            # (N, D), and the camera of each image
    erase(encoder, found, ["camera"])               # its last block gives features without it
    found(features)                                 # the same of vectors

Of all affine maps that make the mean features of all values equal, so that no linear classifier
tells the values apart, it is the one that changes the features least: Belrose et al. 2023 (arXiv
2306.03819), theorem 4.3. That holds for the images that it was fitted on. Where they are few for
the width, the covariance is shrunk towards a multiple of the identity: the means are equal all the
same, and the change is the least for the covariance as shrunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.configuration_mim_refiner import FORMAT
from ..model.modeling_mim_refiner import Eraser, MimRefinerModel

# variances below this share of the largest, and squares of correlations
_ROUNDING = 1e-12

# Shapes below: N images, D the width of the features, F fields, R directions.


@dataclass(frozen=True, eq=False)
class FittedEraser:
    """x - ((x - mean) @ read.T) @ write.T, in float64.

    Attributes:
        mean: (D,).
        read: (R, D).
        write: (D, R); `read @ write` is the identity.
    """

    mean: Tensor
    read: Tensor
    write: Tensor

    @property
    def rank(self) -> int:
        """How many directions are erased."""
        return len(self.read)

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, D) without what is erased, in their own dtype."""
        found = (features.double() - self.mean) @ self.read.T
        return (features.double() - found @ self.write.T).to(features.dtype)

    def after(self, first: "FittedEraser") -> "FittedEraser":
        """Both in one: `first`, then this one, which was fitted on what `first` leaves.

        So its mean is a fixed point of both.
        """
        read = torch.cat([first.read, self.read - (self.read @ first.write) @ first.read])
        return FittedEraser(self.mean, read, torch.cat([first.write, self.write], dim=1))


def fit_eraser(features: Tensor, values: Tensor, shrinkage: float | None = None) -> FittedEraser:
    """The eraser of one field or of several at once, in float64.

    Args:
        features: (N, D).
        values: whole numbers (N,) or (F, N), -1 where one is missing: there the image says nothing
            of the field, and with no value at all it is left out.
        shrinkage: s of the covariance (1 - s) * S + s * trace(S) / D * I; None for D / (D + N),
            the more the fewer images there are for the width.
    """
    fields = values.reshape(-1, values.shape[-1])
    known = (fields >= 0).any(dim=0)
    rows = features[known].detach().double()
    fields = fields[:, known]
    count, width = rows.shape
    if shrinkage is None:
        shrinkage = width / (width + count)

    mean = rows.mean(dim=0)
    centred = rows - mean
    covariance = centred.T @ centred / count
    level = covariance.trace() / width
    identity = torch.eye(width, dtype=torch.float64)
    covariance = (1 - shrinkage) * covariance + shrinkage * level * identity
    strengths, axes = torch.linalg.eigh(covariance)
    # directions that are the same in all images have nothing to erase
    least = max(_ROUNDING * float(strengths[-1]), torch.finfo(torch.float64).tiny)
    scales = strengths.clamp_min(least).sqrt()
    whiten = (axes / scales) @ axes.T
    colour = (axes * scales) @ axes.T

    crossed = torch.cat([_crossed(centred, own) for own in fields], dim=1)
    left, sizes, _ = torch.linalg.svd(whiten @ crossed, full_matrices=False)
    left = left[:, sizes > math.sqrt(_ROUNDING) * sizes[:1]]
    return FittedEraser(mean, left.T @ whiten, colour @ left)


def _crossed(centred: Tensor, own: Tensor) -> Tensor:
    """The covariance of features (N, D) with each value of a field (N,), (D, V)."""
    has = own >= 0
    if not bool(has.any()):
        return centred.new_empty(centred.shape[1], 0)
    _, numbers = own[has].unique(return_inverse=True)
    hot = torch.nn.functional.one_hot(numbers).double()
    return centred[has].T @ (hot - hot.mean(dim=0)) / len(hot)


def eraser_of(encoder: MimRefinerModel) -> FittedEraser | None:
    """What an encoder erases; None for one that erases nothing."""
    eraser = encoder.layers[-1].eraser
    if not isinstance(eraser, Eraser):
        return None
    parts = [part.detach().cpu().double() for part in (eraser.mean, eraser.read, eraser.write)]
    return FittedEraser(*parts)


def erase(encoder: MimRefinerModel, found: FittedEraser, names: Sequence[str]) -> None:
    """Let the last block of an encoder erase, in place, after what it erases already.

    Args:
        found: fitted on the encoder's features as they are; of rank 0 it leaves all as it is.
        names: of the fields.
    """
    if found.rank == 0:
        return
    before = eraser_of(encoder)
    if before is not None:
        found = found.after(before)
    config = encoder.config
    config.erased_directions = found.rank
    config.erased = list(dict.fromkeys([*(config.erased or []), *names]))
    config.format_version = FORMAT
    eraser = Eraser(config)
    for name in ("mean", "read", "write"):
        getattr(eraser, name).copy_(getattr(found, name))
    weight = encoder.embeddings.patch_embeddings.weight
    encoder.layers[-1].eraser = eraser.to(weight)

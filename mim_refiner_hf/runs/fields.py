"""The metadata of a run: what is erased of it at the end, and which images it makes neighbours.

fields = open_fields(recipe, images.training)          # None without --forget and --keep
fields = settle_fields(fields, recipe, start.config)
print(fields.plan_line())
trainer = Trainer(..., metadata=fields.metadata())
erased = fields.erase(encoder, images.training, processor, seed=0, num_workers=4)

A field to forget that has few values is erased from the features when the training has ended: the
training itself is that without it. One of many values would take too many directions with it, and
one of few images a value cannot be fitted: of those, neighbours are looked up among other values.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..data.broken import readable
from ..data.fields import Field, find_fields
from ..data.images import ImageDataset, evenly_spaced
from ..data.loading import Loading, Processor
from ..data.stream import ImageStream
from ..evaluation.features import encode_images, own_columns
from ..evaluation.low_shot import probe_accuracy
from ..model.configuration_mim_refiner import MimRefinerConfig
from ..model.modeling_mim_refiner import MimRefinerModel
from ..model.poolings_mim_refiner import LEARNED_POOLINGS
from ..publishing.run_file import Erased, ErasedField
from ..refinement.erasure import erase, fit_eraser
from ..refinement.metadata import Metadata, have_neighbours
from ..refinement.recipe import RefineRecipe
from ..refinement.recipe_data import names_in
from ..refinement.recipe_method import trained_part
from ..runtime.checkpoint import Checkpoint
from ..runtime.distributed import gather_objects, rank
from ..runtime.seeding import random_generator
from ..runtime.text import one_line
from ..runtime.wording import setting

# at most this share of the width is erased, and a value has so many images on average
_SHARE = 8
_IMAGES_PER_VALUE = 10
# for an eraser more tell no more; a probe of them takes a minute
_MOST_IMAGES = 50_000
_MOST_PROBED = 2000


@dataclass(frozen=True, eq=False)
class RunFields:
    """The fields of a run.

    Attributes:
        fields: those to forget, then those to keep.
        num_forgotten: how many are to be forgotten.
        indices: places of the training images in the whole data set.
        width: of the features.
        room: how many more of its directions may be erased.
        erased: numbers of the fields that are erased; the others say what neighbours are.
    """

    fields: list[Field]
    num_forgotten: int
    indices: np.ndarray
    width: int = 0
    room: int = 0
    erased: tuple[int, ...] = ()

    @property
    def looked_up(self) -> list[int]:
        """Numbers of the fields that say which images are neighbours."""
        return [place for place in range(len(self.fields)) if place not in self.erased]

    @property
    def forgotten(self) -> list[bool]:
        """By field that is looked up, whether it is to be forgotten."""
        return [place < self.num_forgotten for place in self.looked_up]

    @property
    def about_neighbours(self) -> list[str]:
        """The settings that need neighbours."""
        named = {True: "forget", False: "keep"}
        return list(dict.fromkeys(named[forgotten] for forgotten in self.forgotten))

    @property
    def directions(self) -> int:
        """How many directions are erased, at most."""
        return sum(len(self._counts(place)) - 1 for place in self.erased)

    @property
    def erased_names(self) -> list[str]:
        """Names of the fields that are erased."""
        return [self.fields[place].name for place in self.erased]

    @property
    def values(self) -> np.ndarray:
        """Of all images of the data set (F, N)."""
        return np.stack([field.values for field in self.fields])

    @property
    def digest(self) -> str:
        """Tells fields of other values apart."""
        return hashlib.sha256(self.values.tobytes()).hexdigest()[:16]

    def metadata(self) -> Metadata | None:
        """What the training looks up; None where all images may be neighbours."""
        if not self.looked_up:
            return None
        return Metadata(self.values[self.looked_up], self.forgotten)

    def have_neighbours(self) -> np.ndarray:
        """Whether each training image has a neighbour to look up (n,)."""
        return have_neighbours(self.values[self.looked_up][:, self.indices], self.forgotten)

    def _counts(self, place: int) -> np.ndarray:
        """Of each value of a field, how many training images have it."""
        own = self.fields[place].values[self.indices]
        return np.unique(own[own >= 0], return_counts=True)[1]

    def few_values_first(self, config: MimRefinerConfig) -> "RunFields":
        """The same, with those erased that have few values and images enough, the fewest first."""
        room = config.hidden_size // _SHARE - config.erased_directions
        erased = []
        for place in sorted(range(self.num_forgotten), key=lambda each: len(self._counts(each))):
            counts = self._counts(place)
            if len(counts) - 1 <= room and counts.mean() >= _IMAGES_PER_VALUE:
                erased.append(place)
                room -= len(counts) - 1
        return replace(self, width=config.hidden_size, room=room, erased=tuple(sorted(erased)))

    # ---- in words

    def plan_line(self) -> str:
        """What becomes of each field, and how many images have neighbours to look up."""
        parts = []
        for place in self.erased:
            parts.append(
                f"forget {self._about(place)}: erased from the features at the end, "
                f"{len(self._counts(place)) - 1} of {self.width} directions"
            )
        for place, forgotten in zip(self.looked_up, self.forgotten, strict=True):
            which = "other values" if forgotten else "the same value"
            named = "forget" if forgotten else "keep"
            parts.append(f"{named} {self._about(place)}: neighbours of {which}")
        if self.looked_up:
            found = self.have_neighbours()
            with_some = int(found.sum())
            line = f"{with_some} of {len(found)} images have neighbours to look up"
            if with_some < len(found):
                line += (
                    f", the other {len(found) - with_some} keep their own other view as positive"
                )
            parts.append(line)
        return "; ".join(parts)

    def _about(self, place: int) -> str:
        """The name of a field, its values, how many images have none, and why it is looked up."""
        field = self.fields[place]
        forgotten = place < self.num_forgotten
        counts = self._counts(place)
        missing = len(self.indices) - int(counts.sum())
        facts = [f"{len(counts)} value{'' if len(counts) == 1 else 's'}"]
        if missing:
            facts.append(f"{missing} images have none")
        if forgotten and counts.max(initial=1) == 1:
            facts.append("no two images share one, so it rules out nothing")
        elif forgotten and place not in self.erased and len(counts) - 1 <= self.room:
            facts.append(f"fewer than {_IMAGES_PER_VALUE} images each on average, too few to erase")
        elif forgotten and place not in self.erased:
            facts.append(f"too many to erase from {self.width} channels")
        rare = int((counts < _IMAGES_PER_VALUE).sum())
        if place in self.erased and rare:
            facts.append(f"{rare} with fewer than {_IMAGES_PER_VALUE} images, erased less surely")
        if not forgotten and len(counts) == 1 and not missing:
            facts.append("all images share it, so it rules out nothing")
        return f"{one_line(field.name)} ({', '.join(facts)})"

    # ---- at the end

    def erase(
        self,
        encoder: MimRefinerModel,
        images: ImageDataset,
        processor: Processor,
        *,
        seed: int,
        num_workers: int,
    ) -> Erased | None:
        """Let an encoder erase the fields that are erased, in place; all processes take part.

        Args:
            images: those that were trained on.

        Returns:
            What was erased, and how well; None where nothing is, or features are not finite.
        """
        if not self.erased:
            return None
        values = self.values[list(self.erased)]
        known = (values[:, images.indices] >= 0).any(axis=0)
        images = evenly_spaced(images.subset(np.flatnonzero(known)), _MOST_IMAGES)
        # which are broken, the training has said
        images, _ = readable(images, num_workers)
        column = own_columns(encoder.config)[-1]
        loading = Loading(num_workers=num_workers)
        features, _ = encode_images(
            encoder, images, processor, [column], loading=loading, desc="features to erase from"
        )
        rows = features[column]
        if not bool(rows.isfinite().all()):
            return None

        found = erased = None
        if rank() == 0:
            own = torch.from_numpy(values[:, images.indices])
            found = fit_eraser(rows, own)
            erased = self._probed(rows, own, found.rank, seed)
        found, erased = gather_objects((found, erased))[0]
        assert found is not None
        erase(encoder, found, self.erased_names)
        return erased

    def _probed(self, rows: Tensor, values: Tensor, directions: int, seed: int) -> Erased:
        """What an eraser that was fitted on half of the images leaves in the other half."""
        order = torch.from_numpy(random_generator(seed, "erased").permutation(len(rows)))
        fitted, probed = order.tensor_split(2)
        probed = probed[:_MOST_PROBED]
        left = fit_eraser(rows[fitted], values[:, fitted])(rows[probed])
        fields: list[ErasedField] = []
        for name, own in zip(self.erased_names, values[:, probed], strict=True):
            has = own >= 0
            own = own[has]
            fields.append(
                {
                    "name": name,
                    "chance": float(own.bincount(minlength=1).max()) / max(len(own), 1),
                    "probe_before": _crosswise(rows[probed][has], own),
                    "probe_after": _crosswise(left[has], own),
                }
            )
        return {
            "fields": fields,
            "directions": directions,
            "width": rows.shape[1],
            "images": len(rows),
            "probed": len(probed),
        }


def _crosswise(rows: Tensor, own: Tensor) -> float | None:
    """How often a probe names the values (N,) of either half of rows (N, D), learnt from the other.

    The rows are in an order that was drawn. None for too few.
    """
    if len(rows) < _IMAGES_PER_VALUE:
        return None
    first = torch.arange(len(rows)) % 2 == 0
    shares = []
    for known in (first, ~first):
        shares.append(probe_accuracy(rows[known], own[known], rows[~known], own[~known]))
    return sum(shares) / 2


# ---- before any work


def open_fields(recipe: RefineRecipe, images: ImageDataset | ImageStream) -> RunFields | None:
    """The fields that a recipe names, of the images that are trained on; None where it names none.

    Raises:
        FileNotFoundError, ValueError: as of `find_fields`, and for one to forget of a single value.
    """
    to_forget = names_in(recipe.forget)
    to_keep = names_in(recipe.keep)
    if not to_forget and not to_keep:
        return None
    # or the recipe would have refused it
    assert isinstance(images, ImageDataset)
    fields = find_fields(images, to_forget, "forget", recipe.metadata)
    fields += find_fields(images, to_keep, "keep", recipe.metadata)
    for field in fields[: len(to_forget)]:
        own = field.values[images.indices]
        if len(np.unique(own[own >= 0])) < 2:
            which = "images" if (own >= 0).all() else "images that have one"
            raise ValueError(
                f"{setting('forget', recipe.forget)}: all {int((own >= 0).sum())} {which} have the "
                f"same value of {one_line(field.name)}, so there is nothing to forget; leave it out"
            )
    return RunFields(fields, len(to_forget), images.indices)


def settle_fields(fields: RunFields, recipe: RefineRecipe, config: MimRefinerConfig) -> RunFields:
    """What becomes of each field with the encoder of a run.

    Raises:
        ValueError: for what else is asked for that cannot hold an eraser, and where fields are
            looked up and no image has a neighbour.
    """
    fields = fields.few_values_first(config)
    named = setting("forget", recipe.forget)
    if fields.erased:
        names = ", ".join(map(one_line, fields.erased_names))
        part = trained_part(recipe.trainable or "all")
        if part is not None and part.kind == "lora":
            raise ValueError(
                f"{named} and {setting('trainable', recipe.trainable)} exclude each other: {names} "
                "is erased from the features at the end, and adapters cannot hold that; leave one "
                "of them out"
            )
        pooling = recipe.pooling or config.pooling
        if pooling in LEARNED_POOLINGS:
            raise ValueError(
                f"{named}: {names} is erased from the tokens at the end, which the weights of "
                f"pooling {pooling} would not know; give {setting('pooling', 'mean')}"
            )
    if "forget" in fields.about_neighbours and recipe.swap == "none":
        raise ValueError(
            f"{named}: {fields.plan_line()}, and {setting('swap', 'none')} uses no neighbours; "
            "leave one of them out"
        )
    if fields.looked_up and not fields.have_neighbours().any():
        raise ValueError(f"{_asked(recipe)}: {_why_none(fields)}")
    return fields


def _asked(recipe: RefineRecipe) -> str:
    named = []
    for name in ("forget", "keep"):
        if getattr(recipe, name) is not None:
            named.append(setting(name, getattr(recipe, name)))
    return " ".join(named)


def _why_none(opened: RunFields) -> str:
    """Why no image has a neighbour, and what to do."""
    count = len(opened.indices)
    for field in opened.fields[opened.num_forgotten :]:
        own = field.values[opened.indices]
        if np.unique(own[own >= 0], return_counts=True)[1].max(initial=0) < 2:
            return (
                f"no two of the {count} images have the same value of {one_line(field.name)}, so "
                "none has a neighbour; leave it out"
            )
    return (
        f"none of the {count} images has a neighbour that differs in all to forget and agrees in "
        "all to keep; name fewer columns"
    )


def check_same_fields(fields: RunFields | None, resume: Checkpoint, asked: RefineRecipe) -> None:
    """Whether a run goes on with the values that it began with.

    Raises:
        ValueError: when it does not.
    """
    if fields is not None and resume.state.get("fields", fields.digest) != fields.digest:
        raise ValueError(
            f"{_asked(asked)}: these columns have other values than when the run in "
            f"{asked.output_dir} began; put them back as they were, or name another "
            f"{setting('output_dir')}"
        )

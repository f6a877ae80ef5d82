"""The metadata of a run: read and checked before any work, and what the plan says of it.

fields = open_fields(recipe, images.training)          # None without --forget and --keep
print(fields.plan_line())
trainer = Trainer(..., metadata=fields.metadata())
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from ..data.fields import Field, find_fields
from ..data.images import ImageDataset
from ..data.stream import ImageStream
from ..refinement.metadata import Metadata, have_neighbours
from ..refinement.recipe import RefineRecipe
from ..refinement.recipe_data import names_in
from ..runtime.checkpoint import Checkpoint
from ..runtime.text import one_line
from ..runtime.wording import setting


@dataclass(frozen=True, eq=False)
class RunFields:
    """The fields of a run.

    Attributes:
        fields: those to forget, then those to keep.
        num_forgotten: how many are to be forgotten.
        indices: places of the training images in the whole data set.
    """

    fields: list[Field]
    num_forgotten: int
    indices: np.ndarray

    @property
    def forgotten(self) -> list[bool]:
        """By field, whether it is to be forgotten."""
        return [place < self.num_forgotten for place in range(len(self.fields))]

    @property
    def values(self) -> np.ndarray:
        """Of all images of the data set (F, N)."""
        return np.stack([field.values for field in self.fields])

    @property
    def digest(self) -> str:
        """Tells fields of other values apart."""
        return hashlib.sha256(self.values.tobytes()).hexdigest()[:16]

    def metadata(self) -> Metadata:
        """The same for the training."""
        return Metadata(self.values, self.forgotten)

    def plan_line(self) -> str:
        """How many images have neighbours to look up, in words."""
        found = have_neighbours(self.values[:, self.indices], self.forgotten)
        parts = []
        for field, forgotten in zip(self.fields, self.forgotten, strict=True):
            parts.append(f"{'forget' if forgotten else 'keep'} {self._about(field, forgotten)}")
        with_some = int(found.sum())
        line = f"{', '.join(parts)}: {with_some} of {len(found)} images have neighbours to look up"
        if with_some < len(found):
            line += f", the other {len(found) - with_some} keep their own other view as positive"
        return line

    def _about(self, field: Field, forgotten: bool) -> str:
        """The name of a field, how many values it has, and how many images have none."""
        own = field.values[self.indices]
        missing = int((own < 0).sum())
        numbers, counts = np.unique(own[own >= 0], return_counts=True)
        facts = [f"{len(numbers)} value{'' if len(numbers) == 1 else 's'}"]
        if missing:
            facts.append(f"{missing} images have none")
        if forgotten and counts.max(initial=1) == 1:
            facts.append("no two images share one, so it rules out nothing")
        if not forgotten and len(numbers) == 1 and not missing:
            facts.append("all images share it, so it rules out nothing")
        return f"{one_line(field.name)} ({', '.join(facts)})"


def open_fields(recipe: RefineRecipe, images: ImageDataset | ImageStream) -> RunFields | None:
    """The fields that a recipe names, of the images that are trained on; None where it names none.

    Raises:
        FileNotFoundError, ValueError: as of `find_fields`, and where no image has a neighbour.
    """
    to_forget = names_in(recipe.forget)
    to_keep = names_in(recipe.keep)
    if not to_forget and not to_keep:
        return None
    # or the recipe would have refused it
    assert isinstance(images, ImageDataset)
    fields = find_fields(images, to_forget, "forget", recipe.metadata)
    fields += find_fields(images, to_keep, "keep", recipe.metadata)
    opened = RunFields(fields, len(to_forget), images.indices)
    found = have_neighbours(opened.values[:, images.indices], opened.forgotten)
    if not found.any():
        raise ValueError(f"{_asked(recipe)}: {_why_none(opened)}")
    return opened


def _asked(recipe: RefineRecipe) -> str:
    named = []
    for name in ("forget", "keep"):
        if getattr(recipe, name) is not None:
            named.append(setting(name, getattr(recipe, name)))
    return " ".join(named)


def _why_none(opened: RunFields) -> str:
    """Why no image has a neighbour, and what to do."""
    count = len(opened.indices)
    for field, forgotten in zip(opened.fields, opened.forgotten, strict=True):
        own = field.values[opened.indices]
        kinds, counts = np.unique(own[own >= 0], return_counts=True)
        name = one_line(field.name)
        if forgotten and len(kinds) == 1 and (own >= 0).all():
            return (
                f"all {count} images have the same value of {name}, so none has a neighbour of "
                "another one; leave it out"
            )
        if not forgotten and counts.max(initial=0) < 2:
            return (
                f"no two of the {count} images have the same value of {name}, so none has a "
                "neighbour; leave it out"
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

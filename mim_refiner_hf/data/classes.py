"""One table of classes for two sets of images that are compared, whatever each calls its own.

    bank, evaluated = with_one_class_table(bank, evaluated)

Every set numbers its classes by itself: a folder by the sub-folders that it has, a table by the
words that occur. The number 2 of one set and of another are then two classes. So before any score:

- images without a label (None, NaN, -1, empty text) are left out, counted and said; where too few
  are left, or no class is in both parts of one data set, or all of it is of one class, nothing is
  measured by labels;
- classes are matched by name. Where one set has none, its numbers stand for names that are these
  numbers, or for those that the other's data set states in their order (`ClassLabel`). Where
  neither has names, numbers are compared. What cannot be matched is refused;
- classes that the bank lacks are named: their images cannot be right.
"""

import logging
import re

import numpy as np

from ..runtime.text import one_line
from .images import ImageDataset

logger = logging.getLogger(__name__)

_NAMED_IN_A_LINE = 5
# of the bank, as many as vote in k-NN; of the others, two, or a score has no error
_LEAST_LABELLED = (10, 2)


def with_one_class_table(
    bank: ImageDataset, evaluated: ImageDataset
) -> tuple[ImageDataset, ImageDataset]:
    """Both sets, numbered alike, and of labelled images only; as they are where one has no labels.

    Raises:
        ValueError: for sets of which one has names and the other numbers that do not mean them, and
            for sets without a class in common.
    """
    if bank.labels is None or evaluated.labels is None:
        for images, other in ((bank, evaluated), (evaluated, bank)):
            if images.labels is None and other.labels is not None:
                logger.warning(
                    "%s has labels, %s has none: nothing is measured by labels",
                    one_line(other.name),
                    one_line(images.name),
                )
        return bank, evaluated

    parts = labelled_part(bank), labelled_part(evaluated)
    for images, part, least in zip((bank, evaluated), parts, _LEAST_LABELLED, strict=True):
        if len(part) < min(least, len(images)):
            few = f"{len(part)} of {len(images)} images of {one_line(images.name)} have a label"
            return _unlabelled(bank, evaluated, f"{few}, which are too few")
    bank, evaluated = parts
    bank_names, names = _names(bank, evaluated), _names(evaluated, bank)
    # held out of one data set that has an image or two of each class
    if bank.found is evaluated.found and not bank_names.keys() & names.keys():
        return _unlabelled(bank, evaluated, f"no class of {one_line(bank.name)} is in both parts")
    # such as the one sub-folder that holds all photos, which any encoder tells with 100 %
    if bank.found is evaluated.found and len(bank_names.keys() | names.keys()) == 1:
        only = one_line(next(iter(bank_names.values())))
        reason = f"all labelled images of {one_line(bank.name)} are of one class, {only}"
        return _unlabelled(bank, evaluated, reason)
    _check_common(bank, evaluated, bank_names, names, bank.name)

    # the bank's classes keep their numbers; what it lacks comes behind
    table = list(dict.fromkeys([*(bank.class_names or []), *bank_names.values(), *names.values()]))
    unnamed = bank.class_names is None and evaluated.class_names is None
    # plain numbers stay what they are, unless they are far apart
    if unnamed and max(map(int, table)) < 2 * len(table):
        return bank, evaluated
    places = {name: place for place, name in enumerate(table)}
    return (
        bank.with_labels({number: places[name] for number, name in bank_names.items()}, table),
        evaluated.with_labels({number: places[name] for number, name in names.items()}, table),
    )


def _unlabelled(
    bank: ImageDataset, evaluated: ImageDataset, reason: str
) -> tuple[ImageDataset, ImageDataset]:
    """Both sets without labels, which is said with its reason."""
    logger.warning("%s: nothing is measured by labels", reason)
    return bank.without_labels(), evaluated.without_labels()


def labelled_part(images: ImageDataset) -> ImageDataset:
    """The images that have a label; how many have none is said."""
    assert images.labels is not None
    has_one = images.labels >= 0
    missing = int((~has_one).sum())
    if missing == 0:
        return images

    logger.warning(
        "%d of %d images of %s have no label: scores by labels are those of the other %d",
        missing,
        len(images),
        one_line(images.name),
        len(images) - missing,
    )
    return images.subset(np.flatnonzero(has_one))


def _names(images: ImageDataset, other: ImageDataset) -> dict[int, str]:
    """The name of every class number that occurs among the images."""
    assert images.labels is not None
    used = np.unique(images.labels).tolist()
    if images.class_names is not None:
        return {number: images.class_names[number] for number in used}
    numbers = {number: str(number) for number in used}
    if other.class_names is None or set(numbers.values()) <= set(other.class_names):
        return numbers

    if other.found.names_stated and used[-1] < len(other.class_names):
        return {number: other.class_names[number] for number in used}
    # "0" and "2" are numbers as well, "01" might be a name
    if all(re.fullmatch("0|[1-9][0-9]*", name) for name in other.class_names):
        return numbers
    raise ValueError(
        f"the classes of {one_line(other.name)} are names ({_some(other.class_names)}), those of "
        f"{one_line(images.name)} numbers ({_some(list(numbers.values()))}); which is which is not "
        "known: give both the same names, or the same numbers"
    )


def check_listed(listed: ImageDataset, evaluated: ImageDataset, called: str) -> None:
    """Say which classes the listed images of a bank lack, of two sets with one class table.

    ValueError where they have no class in common with `evaluated`.
    """
    names = _names(evaluated, listed)
    _check_common(listed, evaluated, _names(listed, evaluated), names, called)


def _check_common(
    bank: ImageDataset,
    evaluated: ImageDataset,
    bank_names: dict[int, str],
    names: dict[int, str],
    called: str,
) -> None:
    """Whether the sets have classes in common; the gaps of the bank, `called` so, are said."""
    in_bank = set(bank_names.values())
    missing = [name for name in names.values() if name not in in_bank]
    if not missing:
        return

    if len(missing) == len(names):
        raise ValueError(
            f"{one_line(evaluated.name)} and {one_line(called)} have no class in common: "
            f"{_some(missing)}, and {_some(list(bank_names.values()))}; name images of the same "
            "classes"
        )

    assert evaluated.labels is not None
    numbers = [number for number, name in names.items() if name in missing]
    lost = int(np.isin(evaluated.labels, numbers).sum())
    logger.warning(
        "%s has no image of %d of the classes to tell apart (%s): %d images of %s cannot be right",
        one_line(called),
        len(missing),
        _some(missing),
        lost,
        one_line(evaluated.name),
    )


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(one_line(name) for name in names[:_NAMED_IN_A_LINE])
    more = len(names) - _NAMED_IN_A_LINE
    return f"{shown} and {more} more" if more > 0 else shown

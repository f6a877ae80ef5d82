"""The licence of weights, and how it stays with what is made of them.

    load_encoder("facebook/vit-mae-base").licence     # cc-by-nc-4.0, as its card states
    saved_licence("out/model")                        # of a folder or Hub name, weights unread

It is what the card beside the weights states, or the zoo's entry; never one of ours, and where
nothing is stated it is not known. `load_encoder` finds it, and every card that `refine`, `convert`
and `export` write states it again, so it is found however many times a model goes through them.

A card is a stranger's file: at most 256 kB of its metadata are read, as plain text without tags,
and what has not the form of a licence counts as not known, with a warning.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..runtime.strangers import file_of_model
from ..runtime.text import one_line
from ..runtime.wording import setting

logger = logging.getLogger(__name__)

CARD = "README.md"
"""The card of a model, beside its weights."""

# our fields with the keys of a card's metadata
_KEYS = {"identifier": "license", "name": "license_name", "link": "license_link"}
# of a card; the longest of the zoo has 12 kB of metadata
_MOST_BYTES = 256 * 1024
_MOST_CHARACTERS = 300
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,99}")
# a web address, or a path in the repository: nothing with another scheme
_LINK = re.compile(r"https?://\S+|[^\s:]+")
# what YAML reads as nothing
_NOTHING = ("", "~", "null", "Null", "NULL", "none", "None")


@dataclass(frozen=True)
class Licence:
    """What a card says of its licence; all None where it is not known.

    Args:
        identifier: the Hub's word: "mit", "cc-by-nc-4.0", "other".
        name, link: of a licence that has no word there; both go with "other".
    """

    identifier: str | None = None
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        more = [part for part in (self.name, self.link) if part]
        if self.identifier is None or not more:
            return self.identifier or "not known"
        return f"{self.identifier} ({', '.join(more)})"

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: object = "a card") -> "Licence":
        """What the metadata of a card state; `where` they stand, for the warning."""
        stated = {}
        for field, key in _KEYS.items():
            value = metadata.get(key)
            # a list of one is how some write it
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            stated[field] = _checked(field, value, where)

        if stated["identifier"] is None and (stated["name"] or stated["link"]):
            stated["identifier"] = "other"
        return cls(**stated)

    def metadata(self) -> dict[str, str]:
        """The metadata of a card under this licence; empty where it is not known."""
        stated = {key: getattr(self, field) for field, key in _KEYS.items()}
        return {key: value for key, value in stated.items() if value is not None}


UNKNOWN = Licence()
"""Nothing is stated."""


def _checked(field: str, value: Any, where: object) -> str | None:
    """A stranger's value of one field, on one line; None, with a warning, for what is none."""
    if value is None or (isinstance(value, str) and value.strip() in _NOTHING):
        return None
    form = {"identifier": _IDENTIFIER, "link": _LINK}.get(field)
    if isinstance(value, str) and len(value) <= _MOST_CHARACTERS:
        text = one_line(value)
        if form is None or form.fullmatch(text):
            return text

    shown = one_line(str(value)[:80]) if isinstance(value, str) else type(value).__name__
    logger.warning(
        "%s: its licence's %s (%s) has not the form of one and counts as not stated",
        where,
        field,
        shown,
    )
    return None


def licence_beside(folder: Path, hub_name: str | None = None) -> Licence:
    """What the card in a model folder states.

    Args:
        folder: with or without a README.md.
        hub_name: "user/name" of a folder that came from the Hub: a link to a file of the
            repository becomes its address, as the file does not come along.
    """
    card = folder / CARD
    if not card.is_file():
        return UNKNOWN
    licence = Licence.from_metadata(_front_matter(card), where=card)
    if hub_name and licence.link and not licence.link.startswith("http"):
        link = f"https://huggingface.co/{hub_name}/blob/main/{licence.link}"
        return Licence(licence.identifier, licence.name, link)
    return licence


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The metadata on top of a card, every scalar as text; empty where there are none."""
    with card.open("rb") as file:
        text = file.read(_MOST_BYTES).decode("utf-8", errors="replace")
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}

    try:
        end = next(number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---")
        # the loader that knows no tags: nothing is built but text, lists and dictionaries
        found = yaml.load("\n".join(lines[1:end]), Loader=yaml.BaseLoader)
    except (StopIteration, yaml.YAMLError, RecursionError) as error:
        reason = one_line(str(error))[:120] or f"no end within {_MOST_BYTES // 1024} kB"
        logger.warning("%s: its metadata cannot be read (%s): licence not known", card, reason)
        return {}
    return found if isinstance(found, dict) else {}


def saved_licence(name: str) -> Licence:
    """What the card of a folder or of a Hub name states; not known where there is none."""
    card = file_of_model(name, CARD)
    if card is None:
        return UNKNOWN
    return licence_beside(card.parent, None if Path(name).is_dir() else name)


def is_licence(identifier: object) -> bool:
    """Whether a user's word has the form of an identifier of the Hub."""
    return isinstance(identifier, str) and _IDENTIFIER.fullmatch(identifier) is not None


def agreed_licence(found: Licence, stated: str | None, source: object, publish: bool) -> Licence:
    """The licence that a card will state: the one that was found, else the one the user states.

    Args:
        found: with the weights.
        stated: by the user (`license`), for weights of which none is known.
        source: of the weights, for the message.
        publish: whether the card goes to the Hub, where it must be known.

    Raises:
        ValueError: for another licence than that of the weights, a word that is none, or nothing
            where it must be known.
    """
    if stated is not None and not is_licence(stated):
        raise ValueError(
            f"{setting('license', stated)}: must be an identifier of the Hub's list of licences, "
            "such as cc-by-nc-4.0, mit or other"
        )

    if found == UNKNOWN and stated is None and publish:
        raise ValueError(
            f"{source} states no licence, and to be published it needs one: ask its authors and "
            f"give {setting('license', 'cc-by-nc-4.0')} or what it is, or "
            f"{setting('license', 'unknown')}"
        )
    if found == UNKNOWN:
        return Licence(stated)

    if stated not in (None, found.identifier):
        raise ValueError(
            f"{setting('license', stated)}: {source} is under {found}, and so is what is made of "
            f"it; leave {setting('license')} out"
        )
    return found

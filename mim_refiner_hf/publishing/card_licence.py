"""The licence in a card: its line in the text, and the metadata when it is stated later.

licence_line(Licence("mit"), "the starting weights")
state_licence(Path("out/model"), Licence("mit"))
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from ..conversion.licence import CARD, UNKNOWN, Licence
from ..runtime.files import write_text
from ..runtime.text import one_line, plain

_LINE = "- **Licence:**"
_NOT_KNOWN = f"{_LINE} not known"


def licence_line(licence: Licence, start: str) -> str:
    """The line of a card that says under which licence it is, and whose that is.

    Args:
        start: what the licence comes from, in words; empty for weights that come from nothing.
    """
    if licence != UNKNOWN:
        return f"{_LINE} {plain(licence)}, that of {start or 'who trained it'}"
    if not start:
        return f"{_NOT_KNOWN}: none was chosen for these weights, which were trained from nothing"
    return f"{_NOT_KNOWN}: {start} came without one; ask who made them before you share this"


def state_licence(folder: Path, licence: Licence) -> None:
    """Put the licence of a model folder into its card, which is begun where there is none.

    Raises:
        ValueError: when the card's metadata cannot be read.
    """
    path = folder / CARD
    text = f"# {plain(folder.resolve().name)}\n"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path}: its metadata cannot be read ({one_line(error)}); mend it, then publish"
        ) from error

    for key, value in licence.metadata().items():
        setattr(card.data, key, value)
    stated = f"{_LINE} {plain(licence)}, as who published it states"
    body = re.sub(rf"^{re.escape(_NOT_KNOWN)}.*$", lambda _: stated, card.text, flags=re.MULTILINE)
    write_text(path, f"---\n{card.data.to_yaml()}\n---\n{body}")

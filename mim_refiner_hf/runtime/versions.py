"""Which version of a format a file states, and whether this package knows it.

    write_json(path, {"format_version": FORMAT_VERSIONS["checkpoint"], ...})
    check_format("checkpoint", manifest.get("format_version"), path)
    # NewerFormatError: out/.../manifest.json was written by a newer version: format 3, ...

A number goes up when a file of the new version means something else to the old one. What states no
number is of the first version, which stated none; a field that an older version lacks keeps the
meaning that it had without. Model folders have the same in their configuration, which travels
without this file (`model/configuration_mim_refiner.py`).
"""

from pathlib import Path

from .wording import shown

FORMAT_VERSIONS = {"checkpoint": 1, "recipe": 1, "features": 1}
"""Kind of file -> the newest version that is read, which is the one that is written."""


class NewerFormatError(ValueError):
    """A file is of a newer version of the package; it is whole, and to be left alone."""


def check_format(kind: str, stated: object, where: str | Path) -> None:
    """Raise for a format that this version does not know.

    Args:
        kind: a key of `FORMAT_VERSIONS`.
        stated: what the file states; None for the first version.
        where: the file or folder, for the message.

    Raises:
        NewerFormatError: naming file and versions, and what to do.
        ValueError: for what is no version.
    """
    if stated is None:
        return
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        raise ValueError(f"{where} states format_version {shown(stated)}, which is no version")
    if stated > FORMAT_VERSIONS[kind]:
        version = stated if stated < 10**9 else "of many digits"
        raise NewerFormatError(
            f"{where} was written by a newer version: format {version}, this one reads up to "
            f"{FORMAT_VERSIONS[kind]}; upgrade mim_refiner_hf (pip install -U mim-refiner-hf)"
        )

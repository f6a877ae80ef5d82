"""How `evaluate` measures: as in the paper or quickly, which bank, which lists; and what cannot be.

bank_size = checked_bank_size("quick", None, protocols)     # 10000
show_as_in_the_paper(encoder)                               # shorter side 256, centre crop 224
check_added([encoder], data, added_protocols(["fine_tuning"], None, ["1percent.txt"], [], seed=0))
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from ..conversion.preprocessing import as_in_the_paper, image_processor
from ..data.classes import check_listed
from ..evaluation.fine_tuning import FineTuneRecipe, check_fine_tuning, chosen_images
from ..evaluation.linear_probe import check_square
from ..evaluation.low_shot import SHOTS, check_low_shot, listed_split
from ..evaluation.neighbour_agreement import NUM_NEIGHBOURS
from ..evaluation.report import BANK_SIZE
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.distributed import rank
from ..runtime.settings import read_fields
from ..runtime.wording import setting
from .choices import ON_MASKS, Protocol
from .comparison import PROTOCOLS, Added, Data


def added_protocols(
    protocols: Sequence[str],
    recipe: str | None,
    split_file: Sequence[str | Path],
    transfer: Sequence[Any],
    seed: int,
    dtype: str | None = None,
) -> Added:
    """What is measured beside the rest, with the recipe of "fine_tuning" where that is asked for.

    ValueError for names that do not exist or do not go together, and for lists of file names that
    nothing, or more than one protocol, reads.
    """
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown:
        raise ValueError(
            f"{setting('protocols', unknown[0])}: must be one of {', '.join(PROTOCOLS)}"
        )
    on_masks = [name for name in protocols if name in ON_MASKS]
    if on_masks and (len(on_masks) < len(protocols) or transfer):
        raise ValueError(
            f"{setting('protocols', on_masks[0])}: it needs masks and all else needs labels; "
            "give it a run of its own"
        )
    # these train the encoder, or read its patches, in numbers of their own
    for name in protocols:
        if dtype is not None and name in ("fine_tuning", *ON_MASKS):
            raise ValueError(
                f"{setting('dtype', dtype)}: {setting('protocols', name)} has none of that; "
                "leave one of them out"
            )
    if recipe is not None and "fine_tuning" not in protocols:
        raise ValueError(
            f"{setting('recipe', recipe)}: it is for fine-tuning; add "
            f"{setting('protocols', 'fine_tuning')}"
        )

    tuning = None
    if "fine_tuning" in protocols:
        named = read_fields(recipe, FineTuneRecipe) if recipe else {}
        tuning = FineTuneRecipe(**{"seed": seed, **named})
    return Added(protocols, tuning, _lists(split_file, protocols))


def _lists(split_file: Sequence[str | Path], protocols: Sequence[str]) -> list[Path]:
    """The lists of file names; ValueError where nothing, or more than one protocol, reads them."""
    lists = [Path(file) for file in split_file]
    if not lists:
        return []

    asked = setting("split_file", lists[0])
    readers = [name for name in ("low_shot", "fine_tuning") if name in protocols]
    if len(readers) != 1:
        raise ValueError(
            f"{asked}: is for {setting('protocols', 'low_shot')} or "
            f"{setting('protocols', 'fine_tuning')}; name one of them"
        )
    if readers == ["fine_tuning"] and len(lists) > 1:
        raise ValueError(f"{asked}: fine-tuning takes one list, not {len(lists)}; name one")
    return lists


def checked_bank_size(
    protocol: str | None, bank_size: int | None, protocols: Sequence[str]
) -> int | None:
    """Images of the k-NN bank, at most; None for all.

    ValueError for an unknown protocol, and for settings that exclude each other.
    """
    if protocol is not None and protocol not in get_args(Protocol):
        allowed = " or ".join(get_args(Protocol))
        raise ValueError(f"{setting('protocol', protocol)}: must be {allowed}, or left out")
    if bank_size is not None and bank_size < NUM_NEIGHBOURS:
        raise ValueError(
            f"{setting('bank_size', bank_size)}: must be at least {NUM_NEIGHBOURS}, the neighbours "
            "that k-NN looks at"
        )

    on_masks = [name for name in protocols if name in ON_MASKS]
    if on_masks and (protocol or bank_size):
        named = setting("protocol", protocol) if protocol else setting("bank_size", bank_size)
        raise ValueError(f"{named}: {on_masks[0]} has none of that; leave it out")

    if protocol == "quick":
        return bank_size or BANK_SIZE
    return bank_size


def check_added(encoders: Iterable[MimRefinerModel], data: Data, added: Added) -> None:
    """Refuse, before any work, what an added protocol cannot do with encoders, data and lists.

    Raises:
        ValueError, FileNotFoundError: as of `listed_places` and of the protocols.
    """
    if "low_shot" in added.protocols:
        for file in added.split_files:
            listed_split(data.train, file)
        if data.labelled:
            check_low_shot(data.train, data.evaluated, SHOTS)
        if data.labelled and not added.split_files and rank() == 0:
            print(f"low_shot: no {setting('split_file')}, so the splits are drawn from the seed")

    if added.recipe is not None:
        split_file = next(iter(added.split_files), None)
        chosen, _ = chosen_images(data.train, added.recipe, split_file)
        for encoder in encoders:
            check_fine_tuning(encoder, chosen, added.recipe)
        if split_file is not None:
            check_listed(chosen, data.evaluated, setting("split_file", split_file))
    if {"linear_probe", "linear_probe_dinov2"} & set(added.protocols):
        for encoder in encoders:
            check_square(encoder)


def shown_as_in_the_paper(encoder: MimRefinerModel) -> MimRefinerModel:
    """The encoder with the paper's images: the shorter side at 8/7 of the crop, the centre of it.

    It shares the weights with the one that is given, which stays as it is.
    """
    shown = copy.copy(encoder)
    stated = as_in_the_paper(encoder.config, vars(encoder)["image_processor"].to_dict())
    vars(shown)["image_processor"] = image_processor(encoder.config, stated)
    return shown


def words_of_images(encoder: MimRefinerModel) -> str:
    """How images are resized and cropped for an encoder, in words."""
    processor = vars(encoder)["image_processor"]
    size = dict(processor.size)
    crop = dict(processor.crop_size)
    crops = f"{crop['height']} x {crop['width']}"
    if "shortest_edge" not in size:
        return f"resized to {crops}"
    return f"shorter side {size['shortest_edge']}, centre crop {crops}"


def bank_words(bank_size: int | None) -> str:
    """What the k-NN bank is."""
    if bank_size is None:
        return f"all images; of the table of the blocks, at most {BANK_SIZE}, evenly spaced"
    return f"at most {bank_size} images, evenly spaced"

"""The fields of a recipe that say what is refined: images and starting weights."""

from dataclasses import dataclass
from typing import Annotated

from ..data.limits import MAX_BAD_FRACTION
from ..model.poolings_mim_refiner import Pooling
from ..runtime.settings import Allowed, Share, ShareBelowOne, documented

ChannelCount = Annotated[int, Allowed("1 to 16", lambda count: 1 <= count <= 16)]
ValueRange = Annotated[
    list[float],
    Allowed("two numbers, low < high", lambda ends: len(ends) == 2 and ends[0] < ends[1]),
]


def names_in(columns: str | None) -> list[str]:
    """The names of columns in a list with commas; none of None."""
    return [] if columns is None else [name.strip() for name in columns.split(",")]


def _are_names(columns: str) -> bool:
    names = names_in(columns)
    return all(names) and len(set(names)) == len(names)


ColumnNames = Annotated[
    str, Allowed("names of different columns with commas between them", _are_names)
]


@dataclass
class DataFields:
    """Images and starting weights, as `RefineRecipe` has them; it also checks them."""

    recipe: str | None = documented(
        None, "Name in training/recipes/ or path of a YAML file whose fields become the defaults."
    )
    # ---- data
    dataset: str = documented(
        "digits",
        "Image folder (nested, labelled or not), parquet file or folder, Hub name, or 'digits'.",
    )
    dataset_config: str | None = documented(None, "Configuration of a Hub data set.")
    split: str | None = documented(None, "Split to train on; None: 'train', or the whole folder.")
    image_column: str | None = documented(None, "Column of a table that holds the images.")
    label_column: str | None = documented(None, "Column of a table that holds the labels.")
    forget: ColumnNames | None = documented(
        None,
        "Columns such as camera,site whose values the features are to forget: few values are "
        "erased from the features at the end; of many, neighbours are looked up among images of "
        "other values alone.",
    )
    keep: ColumnNames | None = documented(
        None,
        "Columns such as species whose values they are to keep: neighbours are looked up among "
        "images of the same values alone.",
    )
    metadata: str | None = documented(
        None,
        "CSV file (or .jsonl, .parquet) with the columns of forget and keep, and file_name; "
        "None: the data set's own columns, of a folder those of its metadata.csv.",
    )
    follow_links: bool = documented(False, "Enter links to folders, wherever they lead.")
    streaming: bool = documented(False, "Read the data as a stream (needs max_steps), in passing.")
    eval_dataset: str | None = documented(
        None,
        "Images to evaluate on, before and after. None: eval_split of dataset, or a held-out part.",
    )
    eval_split: str | None = documented(
        None, "Split of eval_dataset (or of dataset, if that is None) to evaluate on."
    )
    eval_fraction: ShareBelowOne | None = documented(
        None,
        "Share of the images held out for evaluation when neither is given; 0 for none. Auto: 0.1, "
        "but at most 1000 images, and none of fewer than 200.",
    )
    num_channels: ChannelCount | None = documented(
        None,
        "Channels of the images, 1 to 16. None: the encoder's, or, where the images are arrays, "
        ".npy files or TIFFs of another number than 3 and 1, theirs.",
    )
    value_range: ValueRange | None = documented(
        None,
        "Two values that become black and white, where there are other numbers of channels than 3 "
        "and 1. None: 0 255 for 8 bits, 0 1 for floats that lie there, else measured.",
    )
    max_bad_fraction: Share = documented(
        MAX_BAD_FRACTION,
        "Stop when more than this share of the images is broken; up to it they are replaced, "
        "counted, and listed in broken.json.",
    )
    # ---- model
    model: str | None = documented(
        None, "Starting weights: Hub name, folder, or an original .pth/.pt/.th file."
    )
    family: str | None = documented(
        None, "Family of an original file, when detection should be overruled."
    )
    pretrain: str | None = documented(
        None,
        "Pre-train the starting weights first, by this pre-training recipe, on the same images.",
    )
    init_from: str | None = documented(
        None,
        "Start a new run from the weights of another one: its checkpoint or output folder. Encoder "
        "average, heads and queues come along; steps, optimiser and schedule start anew, without "
        "head warm-up. To go on with a run, give its own command again.",
    )
    pooling: Pooling | None = documented(
        None,
        "What the heads read: cls, mean (of the patches), register (the first), prefix (mean of "
        "CLS and registers), attention (SigLIP, AIMv2) or global_repr (CAPI's predictor), both for "
        "the head on the output; heads on earlier blocks read the mean. Auto: the model's.",
    )

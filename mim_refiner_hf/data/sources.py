"""Where images lie: the undecoded images and the labels of folders, tables and Hub data sets.

    from mim_refiner_hf.data.sources import find_images
    found = find_images("photos/", config=None, split=None)
    found.sources[0], found.labels            # bytes or a path, not decoded; int64 (N,) or None

`open_images` is the public door, and its docstring says what each kind of source means. This file
holds the rules for names and splits, and the sentences for what goes wrong.
"""

import logging
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi

from ..clustering.decoding import EXTENSIONS
from ..clustering.image_items import FolderListing, ending_of, image_files, list_folder
from ..runtime.distributed import rank
from ..runtime.retry import has_no_way, patiently
from ..runtime.text import one_line
from ..runtime.wording import setting
from .columns import TableColumn, find_columns, find_labels, holds_images, label_of, labels_of
from .folders import (
    SPLIT_WORDS,
    as_stream,
    find_in_folder,
    split_and_rows,
    tell_left_aside,
)
from .found import NO_OPTIONS, Entries, FoundImages, SourceOptions, file_size
from .missing import refuse_missing

# `datasets` is imported where it is needed: it costs seconds that an image folder does not need.

logger = logging.getLogger(__name__)

_TABLE_SUFFIXES = (".parquet", ".tar")
# members of a tar shard in which an image must occur
_FIRST_MEMBERS = 64
# seconds
_LONGEST_ANSWER = 10.0


def find_images(
    dataset: str, *, config: str | None, split: str | None, options: SourceOptions = NO_OPTIONS
) -> FoundImages:
    """The images that `dataset` names; see `open_images`, which raises the same errors."""
    found = _find_image_files(dataset, split, options)
    if found is not None:
        return found

    table = load_table(dataset, config=config, split=split, streaming=False, options=options)
    image_column, label_columns = find_columns(table.features, dataset, options)
    labels, class_names, stated = labels_of(table, label_columns)
    sources = TableColumn(table, image_column, dataset)
    entries = _table_entries(Path(dataset).expanduser(), split, table, options)
    return FoundImages(sources, labels, class_names, dataset, entries, stated)


def find_stream(
    dataset: str, *, config: str | None, split: str | None, options: SourceOptions = NO_OPTIONS
) -> tuple[Any, list[str] | None, str | None]:
    """The images that `dataset` names as a `datasets.IterableDataset`; errors as of `open_images`.

    Returns:
        The stream; the names of the classes where its labels are words that could be looked up
        beforehand; and what tells two such streams apart, where that is known.
    """
    found = _find_image_files(dataset, split, options)
    if found is not None:
        return as_stream(found), None, found.entries.digest
    table = load_table(dataset, config=config, split=split, streaming=True, options=options)
    return table, _words_in_tables(dataset, split, table, options), None


def refuse_options(dataset: object, options: SourceOptions) -> None:
    """ValueError for columns of what has none."""
    for name in ("image_column", "label_column"):
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"{setting(name, value)}: {one_line(dataset)} is no table")


def _find_image_files(
    dataset: str, split: str | None, options: SourceOptions
) -> FoundImages | None:
    """The images of a folder of image files; None of any other data set."""
    path = Path(dataset).expanduser()
    if not path.is_dir() or _is_saved(path):
        return None
    listing = list_folder(path, follow_links=options.follow_links)
    tables = _tables_among(listing)
    if tables:
        tell_left_aside(path, listing, list(map(str, tables)))
        return None
    refuse_options(dataset, SourceOptions(image_column=options.image_column))
    return find_in_folder(path, listing, split, options)


# --- tables


def load_table(
    dataset: str,
    *,
    config: str | None,
    split: str | None,
    streaming: bool,
    options: SourceOptions = NO_OPTIONS,
) -> Any:
    """A `datasets.Dataset` (`IterableDataset` if `streaming`) of one split.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: with one clear sentence for what went wrong.
    """
    import datasets

    path = Path(dataset).expanduser()
    if not path.exists():
        refuse_missing(dataset, EXTENSIONS)
    try:
        if path.exists():
            return _load_local(path, split, options, streaming=streaming)

        def load() -> Any:
            builder = datasets.load_dataset_builder(dataset, config)
            return _read_as_stored(builder, split or "train", dataset, streaming=streaming)

        no_way = _no_way_to(dataset)
        if no_way is None:
            return patiently(load, f"opening {dataset}")
        try:
            with _cache_alone():
                return load()
        except (datasets.exceptions.DatasetNotFoundError, OSError) as error:
            raise ConnectionError(
                f"{_line(no_way)}: no way to that host, so it was asked only once, and the data "
                "set is not in the cache"
            ) from error
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"No data set {dataset!r}: not a path here, not 'digits', and not on the Hub, or "
            f"private ({_line(error)})."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"No path {dataset!r} here, and the Hub cannot be reached to look for it "
            f"({_line(error)}); check name and network."
        ) from error
    # tables of strangers make `datasets` and Arrow raise anything
    except Exception as error:
        cause = error.__cause__ or error
        # no room for the cache of `datasets`, or no network: not the table's fault
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from error
        raise ValueError(f"Cannot open {dataset!r}: {_line(cause)}") from error


def _line(error: BaseException) -> str:
    return one_line(error)[:300] or type(error).__name__


def _read_as_stored(builder: Any, split: str, dataset: str, *, streaming: bool) -> Any:
    """What a builder of `datasets` reads; members of tar shards stay bytes, but for the labels.

    Args:
        dataset: what it is called, where it states another number of images than it has.
    """
    decoders = getattr(builder, "DECODERS", None)
    if decoders is not None:
        labels = {"DECODERS": {"cls": decoders["cls"]}}
        builder.__class__ = type("Undecoded", (type(builder),), labels)
    if streaming:
        # which is compared once it has been read: `ImageStream`
        return builder.as_streaming_dataset(split=split)
    name, _ = split_and_rows(split)
    stated = stated_rows(builder, name)
    # a number that is wrong is said, and no reason to refuse what there is
    builder.download_and_prepare(verification_mode="no_checks")
    say_if_misstated(dataset, stated, stated_rows(builder, name))
    return builder.as_dataset(split=split)


def stated_rows(source: Any, split: str | None) -> int | None:
    """The rows that a builder or a stream of `datasets` states for a split; None where it does not.

    What a data set's README says, or the footers of parquet files: nobody has counted.
    """
    about = (source.info.splits or {}).get(str(split))
    count = getattr(about, "num_examples", None)
    return count if type(count) is int and count > 0 else None


def say_if_misstated(name: str, stated: int | None, counted: int | None) -> None:
    """One line where a data set has more or fewer images than it states."""
    if rank() == 0 and stated is not None and counted is not None and stated != counted:
        logger.warning(
            "%s states %d images and has %d; it goes on with those that there are",
            one_line(name),
            stated,
            counted,
        )


def _no_way_to(dataset: str) -> Exception | None:
    """Why the Hub cannot be asked for a data set; None where it can.

    `datasets` by itself takes half a minute to give up a host that is not there.
    """
    import datasets

    try:
        HfApi(datasets.config.HF_ENDPOINT).dataset_info(dataset, timeout=_LONGEST_ANSWER)
    # whatever else is wrong, opening the data set will say
    except Exception as error:
        return error if has_no_way(error) else None
    return None


@contextmanager
def _cache_alone() -> Iterator[None]:
    """Open what is in the cache and ask the Hub for nothing, as with HF_HUB_OFFLINE=1."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _load_local(path: Path, split: str | None, options: SourceOptions, *, streaming: bool) -> Any:
    import datasets

    if _is_saved(path):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_choose_split(saved, split)]
        # of some rows that were saved, it states the number of all
        saved.info.splits = None
        return saved.to_iterable_dataset() if streaming else saved

    files = _table_files(path, options)
    splits = _by_split(files, path)
    name = _choose_split(splits, split)
    _, rows = split_and_rows(split)
    chosen = splits[name]
    stated = None
    if files[0].suffix.lower() == ".tar":
        builder = datasets.load_dataset_builder("webdataset", data_files={name: chosen})
    else:
        chosen, stated = _with_rows(chosen, path)
        builder = datasets.load_dataset_builder(
            "parquet", data_files={name: chosen}, features=_features(chosen[0])
        )
    if stated is not None:
        about = datasets.SplitInfo(name, num_examples=stated)
        builder.info.splits = datasets.splits.SplitDict({name: about})
    return _read_as_stored(builder, name + rows, str(path), streaming=streaming)


def _with_rows(files: Sequence[str], path: Path) -> tuple[list[str], int]:
    """The parquet files that hold any, and how many these state; ValueError where none does."""
    from pyarrow import parquet

    counts = {file: parquet.read_metadata(file).num_rows for file in files}
    full = [file for file, count in counts.items() if count > 0]
    if not full:
        raise ValueError("it has no rows")
    if len(full) < len(files) and rank() == 0:
        logger.warning(
            "%d of %d files of %s have no rows",
            len(files) - len(full),
            len(files),
            one_line(path),
        )
    return full, sum(counts[file] for file in full)


def _features(file: str) -> Any:
    """The types of a parquet file's columns: as its metadata say, or its schema where they do not.

    Anybody can write anything into the metadata.
    """
    import datasets
    from pyarrow import parquet

    schema = parquet.read_schema(file)
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:
        if rank() == 0:
            logger.warning(
                "what %s says of its columns for `datasets` is not believed: %s",
                one_line(file),
                _line(error),
            )
        return datasets.Features.from_arrow_schema(schema.remove_metadata())


def _is_saved(path: Path) -> bool:
    """Written by `datasets`' `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _table_files(path: Path, options: SourceOptions) -> list[Path]:
    """The parquet files of a path, or else its tar shards; hidden ones do not count."""
    if path.is_dir():
        return _tables_among(list_folder(path, follow_links=options.follow_links))
    if path.suffix.lower() not in _TABLE_SUFFIXES:
        raise ValueError(
            f"{path} is one file and neither .parquet nor .tar; "
            "give the folder that holds the images."
        )
    return [path]


def _tables_among(listing: FolderListing) -> list[Path]:
    """The tables that are the data set: none where image files are, and no table holds images."""
    alone = not image_files(listing.files)
    for suffix in _TABLE_SUFFIXES:
        tables = [Path(file) for file in listing.files if ending_of(file) == suffix]
        full = [table for table in tables if _holds_images(table)]
        if full or (tables and alone):
            return full or tables
    return []


def _holds_images(table: Path) -> bool:
    """Whether a parquet file has a column of images, or a tar shard begins with some."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if table.suffix.lower() == ".parquet":
            # without the metadata: see `_features`
            schema = parquet.read_schema(table).remove_metadata()
            return holds_images(datasets.Features.from_arrow_schema(schema))
        with tarfile.open(table) as members:
            first = (member.name for member, _ in zip(members, range(_FIRST_MEMBERS), strict=False))
            return any(ending_of(name) in EXTENSIONS for name in first)
    # a damaged table holds none; where there is nothing else, opening it says what is wrong
    except (OSError, pa.ArrowException, tarfile.TarError, ValueError, KeyError, TypeError):
        return False


def _words_in_tables(
    dataset: str, split: str | None, table: Any, options: SourceOptions
) -> list[str] | None:
    """The words that label a local parquet file's rows, sorted; None of others.

    Only that column is read, so that a stream numbers its classes as the data set does.
    """
    from pyarrow import parquet

    path = Path(dataset).expanduser()
    features = table.features
    label = find_labels(features, dataset, options.label_column) if features else None
    if label is None or not re.fullmatch("(large_)?string", str(features[label].dtype)):
        return None
    if not path.exists() or _is_saved(path):
        return None
    splits = _by_split(_table_files(path, options), path)
    files = splits[_choose_split(splits, split)]
    if Path(files[0]).suffix.lower() != ".parquet":
        return None
    labels: set[int | str | None] = set()
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(columns=[label]):
            labels.update(map(label_of, batch.column(0).unique().to_pylist()))
    return sorted(word for word in labels if isinstance(word, str))


def _by_split(files: Sequence[Path], root: Path) -> dict[str, list[str]]:
    """Files by the first word of their name below `root` that names a split; else "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.findall("[a-z]+", _name_below(root, file).lower())
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def _name_below(root: Path, file: Path) -> str:
    return file.name if file == root else str(file.relative_to(root))


def _choose_split(splits: Mapping[str, object], split: str | None) -> str:
    """`split` may carry a slice ("train[:10%]"); without it "train", or the only split there is."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    name = split_and_rows(split)[0] or "train"
    if name not in splits:
        name = SPLIT_WORDS.get(name, name)
    if not splits:
        raise ValueError("no table (.parquet, ...) is in it.")
    if name not in splits:
        raise ValueError(f"no split {name!r}; it has {sorted(splits)}.")
    return name


def _table_entries(path: Path, split: str | None, table: Any, options: SourceOptions) -> Entries:
    """The files of a local table with their sizes, and its rows; of the Hub's, the revision."""
    if not path.exists():
        return Entries.of(["its revision"], [table._fingerprint])
    files = sorted(path.rglob("*.arrow")) if _is_saved(path) else _table_files(path, options)
    names = []
    lines = []
    for file in files:
        names.append(_name_below(path, file))
        lines.append(f"{names[-1]} {file_size(file)}")
    return Entries.of([*names, f"its split {split}"], [*lines, f"{split} {len(table)}"])

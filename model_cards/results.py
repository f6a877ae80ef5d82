"""What is known about a model of the zoo: `model_cards/<model>/results.yaml`, read strictly.

    results = read_results(Path("model_cards/mae-refined-l16/results.yaml"))
    results.reported[0].score.value, results.reported[0].source              # 81.5, "Tables 2, 13"

A file names an entry of the zoo and lists numbers of two kinds that never share a row or a table:
`reported` ones, which the paper (arXiv 2402.10093) prints, with their tables, or which the authors
state elsewhere, with the place; and `measured` ones, which we found, with command, date and seed.
Every row names a protocol, a data set and a metric of the tables below. A key or a word that is not
there is an error.
"""

import datetime
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mim_refiner_hf.conversion.zoo import ZOO, ZooEntry

# the tables of the paper with numbers of released models and of their starting points
TABLES = (2, 3, 4, 5, 7, 8, 9, 13)
# other places where authors state numbers of their models: in words, and the address
PLACES = {"maect-readme": ("README of ml-jku/MAE-CT", "https://github.com/ml-jku/MAE-CT")}


@dataclass(frozen=True)
class Protocol:
    """How a number comes about.

    Attributes:
        title: for readers.
        text: the words of the paper's appendix C in short.
        task: what the Hub calls it.
        settings: those that a row can name.
    """

    title: str
    text: str
    task: str = "image-classification"
    settings: tuple[str, ...] = ("",)


SHOTS = ("1-shot", "2-shot", "5-shot")
BLOCKS = ("last block", "last 4 blocks")
KNN = "soft k-NN on the CLS token, weighted by cosine similarity (appendices C.4 and C.10)"
PROTOCOLS = {
    "knn": Protocol("k-NN", f"{KNN}, k = 10", settings=BLOCKS),
    "knn-tuned": Protocol(
        "k-NN, k tuned",
        f"{KNN}, k tuned for this model because plain MIM models gain from more",
        settings=BLOCKS,
    ),
    "linear-probe": Protocol(
        "Linear probe",
        "linear classifier on the frozen encoder by the protocol of DINOv2: 50 epochs of SGD, "
        "the best of 13 learning rates, of the last block or the last 4, and of CLS with or "
        "without mean patch (C.3; on other data sets C.8). VTAB: mean rank among the 13 models "
        "of Table 8",
    ),
    "linear-probe-maect": Protocol(
        "Linear probe of MAE-CT",
        "linear classifier on the frozen encoder by the protocol of MAE-CT: 50 epochs of SGD, the "
        "best of ten learning rates and of the epochs, a batch norm without weights before it, on "
        "CLS (ViT-B: mean patch)",
    ),
    "low-shot-logistic": Protocol(
        "Low-shot, frozen",
        "logistic regression on the CLS token of the last block, mean of 3 splits (C.5)",
        settings=SHOTS,
    ),
    "low-shot-fine-tuning": Protocol(
        "Low-shot, fine-tuned",
        "the whole encoder is fine-tuned (C.5)",
        settings=(*SHOTS, "1 %", "10 %"),
    ),
    "clustering": Protocol(
        "Clustering",
        "mini-batch k-means, 100 runs, on the L2-normalised CLS tokens of the validation images "
        "(Section 5.3, C.12)",
        "image-feature-extraction",
        ("lowest loss of 100 runs", "mean of 100 runs"),
    ),
    "class-separation": Protocol(
        "Class separation",
        "scores of the true classes in the space of the CLS tokens (Section 5.3, C.12)",
        "image-feature-extraction",
    ),
    "inat-low-shot": Protocol(
        "Low-shot on iNaturalist 2018",
        "validation accuracy, mean of 3 seeds; 1-shot by a linear probe, 5- and 10-shot by "
        "fine-tuning (C.6, Table 12)",
        settings=("1-shot", "5-shot", "10-shot"),
    ),
    "segmentation-probe": Protocol(
        "Segmentation probe",
        "linear classifier per patch on four blocks of the frozen encoder, 224 px, single scale "
        "(C.7)",
        "image-segmentation",
    ),
    "fine-tuning": Protocol(
        "Fine-tuning", "the whole encoder on all labels, with MAE's hyperparameters (C.9)"
    ),
}
# for readers, and on the Hub where its identifier is sure
DATASETS = {
    "imagenet-1k": ("ImageNet-1K", "ILSVRC/imagenet-1k"),
    "inat18": ("iNaturalist 2018", ""),
    "ade20k": ("ADE20K", ""),
    "vtab-natural": ("VTAB, seven natural data sets", ""),
    "caltech101": ("Caltech101", ""),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "dtd": ("DTD", ""),
    "flowers102": ("Flowers102", ""),
    "pets": ("Pets", ""),
    "sun397": ("Sun397", ""),
    "svhn": ("SVHN", "ufldl-stanford/svhn"),
}
METRICS = {
    "accuracy": "accuracy in %",
    "cluster_accuracy": "cluster accuracy in %",
    "nmi": "NMI x 100",
    "ami": "AMI x 100",
    "ari": "ARI x 100",
    "silhouette": "silhouette x 100",
    "davies_bouldin": "Davies-Bouldin (lower is better)",
    "mean_iou": "mIoU in %",
    "average_rank": "average rank (lower is better)",
}


@dataclass(frozen=True)
class Score:
    """What was scored: names of the tables above, and the value in the unit of its metric."""

    protocol: str
    dataset: str
    metric: str
    value: float
    setting: str = ""

    def __post_init__(self) -> None:
        # lists, as a name that cannot be hashed is to be refused by these words too
        tables = {"protocol": [*PROTOCOLS], "dataset": [*DATASETS], "metric": [*METRICS]}
        for field, allowed in tables.items():
            name = getattr(self, field)
            if name not in allowed:
                raise ValueError(f"{field} {name!r} is unknown; allowed: {', '.join(allowed)}")

        settings = PROTOCOLS[self.protocol].settings
        if self.setting not in settings:
            allowed_settings = ", ".join(map(repr, settings))
            raise ValueError(
                f"setting {self.setting!r} is none of {self.protocol}; allowed: {allowed_settings}"
            )

        if type(self.value) not in (int, float) or not math.isfinite(self.value):
            raise ValueError(f"value {self.value!r} is not a number")

    @property
    def label(self) -> str:
        """The protocol and its setting in words."""
        title = PROTOCOLS[self.protocol].title
        return f"{title}, {self.setting}" if self.setting else title


@dataclass(frozen=True)
class Reported:
    """A score that the paper prints, in each of `tables`, or that is `stated` in another place."""

    score: Score
    tables: tuple[int, ...] = ()
    stated: str = ""

    def __post_init__(self) -> None:
        if self.stated and self.stated not in list(PLACES):
            raise ValueError(f"stated {self.stated!r} is unknown; allowed: {', '.join(PLACES)}")
        is_list = isinstance(self.tables, tuple) and (len(self.tables) > 0 or self.stated)
        if not is_list or not set(self.tables) <= set(TABLES):
            allowed = ", ".join(map(str, TABLES))
            raise ValueError(f"tables {self.tables!r} must be a list of some of {allowed}")

    @property
    def source(self) -> str:
        """Where it is printed."""
        word = "Table" if len(self.tables) == 1 else "Tables"
        printed = f"{word} {', '.join(map(str, self.tables))}"
        if not self.stated:
            return printed
        place = PLACES[self.stated][0]
        return f"{place}; MIM-Refiner, {printed}" if self.tables else place


@dataclass(frozen=True)
class Measured:
    """A score that we found: by which `command`, on which `date`, with which `seed`."""

    score: Score
    command: str
    date: datetime.date
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.command, str) or not self.command.strip():
            raise ValueError(
                f"command {self.command!r} must be the command line that gave the value"
            )
        if type(self.date) is not datetime.date or type(self.seed) is not int:
            raise ValueError(
                f"date {self.date!r} and seed {self.seed!r} must be a date such as 2025-01-31 and "
                "an integer"
            )

    @property
    def source(self) -> str:
        """When and with which seed it was found."""
        return f"{self.date}, seed {self.seed}"


@dataclass(frozen=True)
class Results:
    """One `results.yaml`.

    Args:
        name: of its folder, of the official weights (`conversion.zoo.ZOO`), and of the recipe in
            `training/recipes/` that repeats the refinement.
        reported, measured: the numbers; no score twice in either.
        starting_model: the folder of the model that was refined into this one; None for a model
            that is not refined.
        base_model: the Hub repository of the starting weights, where there is one.
        notes: sentences for the reader.
    """

    name: str
    reported: tuple[Reported, ...]
    measured: tuple[Measured, ...]
    starting_model: str | None = None
    base_model: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ZOO:
            raise ValueError(
                f"its folder's name {self.name!r} is no name of the zoo; allowed: {', '.join(ZOO)}"
            )
        _check_rows(self.reported)
        _check_rows(self.measured)

        is_list = isinstance(self.notes, tuple)
        if not is_list or not all(isinstance(note, str) for note in self.notes):
            raise ValueError(f"notes {self.notes!r} must be a list of sentences")

    @property
    def entry(self) -> ZooEntry:
        """The zoo's entry."""
        return ZOO[self.name]

    @property
    def method(self) -> str:
        """What it was refined by, or is a starting point of: "MIM-Refiner" or "MAE-CT"."""
        return "MAE-CT" if self.entry.family.startswith("maect") else "MIM-Refiner"

    @property
    def rows(self) -> tuple[Reported | Measured, ...]:
        """Every number, the reported ones first; its type says who found it."""
        return (*self.reported, *self.measured)

    @property
    def title(self) -> str:
        """For readers: "MAE-Refined ViT-L/16"."""
        return f"{self.entry.title} {self.entry.architecture}"


def _check_rows(rows: Any) -> None:
    """ValueError for what is no list of rows, and for two rows with the same score."""
    if not isinstance(rows, tuple):
        raise ValueError(f"reported and measured must be lists of rows, found {rows!r}")

    seen = set()
    for row in rows:
        score = row.score
        key = (score.protocol, score.setting, score.dataset, score.metric)
        if key in seen:
            raise ValueError(f"there are two values for {', '.join(filter(None, key))}")
        seen.add(key)


def read_results(path: Path) -> Results:
    """A `results.yaml`, every word of it checked.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for what is not YAML, an unknown or missing key, an unknown word or a value of
            the wrong kind; names the row.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            kinds = {"reported": Reported, "measured": Measured}
            for name, kind in kinds.items():
                if isinstance(content.get(name), list):
                    content[name] = _read_rows(kind, content[name], name)
            if "name" in content:
                raise ValueError("the name is that of the folder; leave it out")
            content["name"] = path.parent.name
        return _from_mapping(Results, content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


T = TypeVar("T")


def _read_rows(kind: type[T], rows: list[Any], name: str) -> list[T]:
    """The rows of one kind; the message about a wrong one says which it is."""
    read = []
    for number, row in enumerate(rows, start=1):
        try:
            read.append(_from_mapping(kind, row))
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}") from error
    return read


def _from_mapping(kind: type[T], content: Any) -> T:
    """A dataclass from a mapping that has exactly its fields.

    Lists become tuples. Where the dataclass has a `score`, the fields of the score stand in the
    mapping itself.
    """
    title = kind.__name__.lower()
    if not isinstance(content, dict):
        raise ValueError(f"expected the fields of {title}, found {content!r}")
    content = dict(content)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]

    if "score" in known:
        of_score = {field.name for field in fields(Score)} & content.keys()
        content["score"] = _from_mapping(Score, {name: content.pop(name) for name in of_score})

    unknown = sorted(map(str, content.keys() - known.keys()))
    if unknown:
        allowed = ", ".join(known)
        raise ValueError(f"unknown key {', '.join(unknown)} in {title}; allowed: {allowed}")
    required = [name for name, field in known.items() if field.default is MISSING]
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing in {title}")

    for name, value in content.items():
        if isinstance(value, list):
            content[name] = tuple(value)
    return kind(**content)

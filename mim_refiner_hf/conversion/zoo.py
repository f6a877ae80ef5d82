"""The zoo: official checkpoints by name. `fetch` downloads a file once and checks it at every use.

    encoder = load_encoder("d2v2-refined-h14")     # mim-refiner convert d2v2-refined-h14 out/model
    path = fetch("mae-refined-l16")   # ~/.cache/huggingface/mim_refiner_hf/mae-refined-l16.th

A model has one name, that of its card and of the recipe that makes it: family, "refined", size and
patch. The names that its authors and earlier versions gave it mean it too.

Files lie under `HF_HOME`, each beside a JSON record of its address, size and sha256
(`download.py`). Where the authors publish a sha256 (birder does), the file has to have it; else the
recorded one is that of the first download. `facebook/data2vec-vision-base` and `-large` need no
entry: they are model folders on the Hub under these very names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..runtime.files import CheckpointError, sha256_of
from ..runtime.retry import patiently
from .birder_models import BIRDER
from .download import Record, download


@dataclass(frozen=True)
class ZooEntry:
    """One official checkpoint and where it lives: a `url`, or a `filename` in the Hub's `repo`.

    Args:
        name: what users type.
        title: for readers.
        family: its layout, a `family` of `layouts.LAYOUTS`.
        architecture: "ViT-L/16", "ViT-H/14", "ViT-2B/14", ...
        url: address of the file; empty where it lies on the Hub.
        repo: "user/name" on the Hub.
        filename: path within `repo`.
        sha256: of the file, as its authors publish it; empty where they do not.
        licence: Hub identifier of the licence that the authors state for the weights; None where
            their pages name none.
    """

    name: str
    title: str
    family: str
    architecture: str
    url: str = ""
    repo: str = ""
    filename: str = ""
    sha256: str = ""
    licence: str | None = None

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.architecture.rpartition("/")[2])


def _entries(
    title: str,
    family: str,
    folder: str,
    *rows: tuple[str, str, str],
    licence: str | None = None,
) -> list[ZooEntry]:
    """Entries of one origin: each row is a name, its architecture and its file below `folder`."""
    entries = []
    for name, architecture, file in rows:
        url = f"{folder}/{file}"
        entries.append(ZooEntry(name, title, family, f"ViT-{architecture}", url, licence=licence))
    return entries


def _mae_ct(title: str, name: str, stem: str, *sizes: str) -> list[ZooEntry]:
    """Entries of MAE-CT's authors, whose files begin with `stem`.

    Their ViT-B/16 are read by the mean of the patches.
    """
    entries = []
    for size in sizes:
        # base16 is B/16
        letter = size[0].upper()
        family = "maect_mean" if letter == "B" else "maect"
        entries += _entries(
            title,
            family,
            _MAE_CT,
            (f"{name}-{size[0]}{size[-2:]}", f"{letter}/{size[-2:]}", f"{stem}_{size}.th"),
        )
    return entries


def _birder(letter: str, stem: str, rows: tuple[tuple[str, str], ...]) -> list[ZooEntry]:
    """birder's CAPI models: each row is what follows the stem of a name, and the file's sha256."""
    entries = []
    for rest, sha256 in rows:
        name = stem + rest
        entry = ZooEntry(
            name,
            "birder's CAPI",
            BIRDER,
            f"ViT-{letter}/14",
            # the smaller iNaturalist model lies beside the larger one
            repo=f"birder-project/{name.removesuffix('-224px')}",
            filename=f"{name}.pt",
            sha256=sha256,
            licence="apache-2.0",
        )
        entries.append(entry)
    return entries


_PRE_NORM = "mim_refiner_prenorm"
_POST_NORM = "mim_refiner_postnorm"
_BY_NC = "cc-by-nc-4.0"

_REFINED = "https://ml.jku.at/research/mimrefiner/download"
_MAE_CT = "https://ml.jku.at/research/maect/download"
_META = "https://dl.fbaipublicfiles.com"
_DBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/mmodal/dbot"

ZOO_ENTRIES = (
    *_entries(
        "MAE-Refined",
        _PRE_NORM,
        _REFINED,
        ("mae-refined-l16", "L/16", "maerefined_l16.th"),
        ("mae-refined-h14", "H/14", "maerefined_h14.th"),
        ("mae-refined-2b14", "2B/14", "maerefined_twob14.th"),
    ),
    *_entries(
        "D2V2-Refined",
        _POST_NORM,
        _REFINED,
        ("d2v2-refined-l16", "L/16", "d2v2refined_l16.th"),
        ("d2v2-refined-h14", "H/14", "d2v2refined_h14.th"),
    ),
    *_entries(
        "dBOT-Refined",
        _PRE_NORM,
        _REFINED,
        ("dbot-refined-l16", "L/16", "dbotrefined_l16.th"),
        ("dbot-refined-h14", "H/14", "dbotrefined_h14.th"),
    ),
    *_entries(
        "CrossMAE-Refined",
        _PRE_NORM,
        _REFINED,
        ("crossmae-refined-l16", "L/16", "crossmaerefined_l16.th"),
    ),
    *_mae_ct("MAE-CT", "mae-ct", "maect", "base16", "large16", "huge16", "huge14"),
    *_mae_ct(
        "MAE-CT with colour augmentations",
        "mae-ct-aug",
        "maectaug",
        "base16",
        "large16",
        "huge16",
        "huge14",
    ),
    *_mae_ct("MAE by MAE-CT's authors", "mae-reimpl", "mae_reimpl", "base16", "large16", "huge16"),
    *_entries(
        "MAE",
        "mae",
        f"{_META}/mae/pretrain",
        ("mae-b16", "B/16", "mae_pretrain_vit_base.pth"),
        ("mae-l16", "L/16", "mae_pretrain_vit_large.pth"),
        ("mae-h14", "H/14", "mae_pretrain_vit_huge.pth"),
        licence=_BY_NC,
    ),
    *_entries(
        "MAE",
        "plain_vit",
        f"{_META}/maws/pretrain/mae_in1k",
        ("mae-2b14", "2B/14", "vit_2b14.pt"),
        licence=_BY_NC,
    ),
    *_entries(
        "data2vec 2.0",
        "data2vec2",
        f"{_META}/fairseq/data2vec2",
        ("d2v2-b16", "B/16", "base_imagenet.pt"),
        ("d2v2-l16", "L/16", "large_imagenet.pt"),
        ("d2v2-h14", "H/14", "huge_imagenet.pt"),
        licence="mit",
    ),
    *_entries(
        "dBOT",
        "dbot",
        _DBOT,
        ("dbot-l16", "L/16", "86.6_dbot_large_pre.pth"),
        ("dbot-h14", "H/14", "87.4_dbot_huge_pre.pth"),
        licence="apache-2.0",
    ),
    ZooEntry(
        "crossmae-l16",
        "CrossMAE",
        "crossmae",
        "ViT-L/16",
        repo="longlian/CrossMAE",
        filename="vitl-mr0.75-kmr0.75-dd12/"
        "imagenet-mae-cross-vitl-pretrain-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth",
        licence=_BY_NC,
    ),
    *(
        ZooEntry(
            f"capi-l14-{data}",
            f"CAPI on {title}",
            "capi",
            "ViT-L/14",
            f"{_META}/capi/{file}.pth",
            licence="apache-2.0",
        )
        for data, title, file in (
            ("p205", "Places205", "capi_vitl14_p205"),
            ("lvd", "LVD-142M", "capi_vitl14_lvd"),
            ("in22k", "ImageNet-22k", "capi_vitl14_i22k"),
            ("in1k", "ImageNet-1K", "capi_vitl14_in1k"),
        )
    ),
    *_birder(
        "B",
        "rope_vit_reg4_b14_capi",
        (
            ("", "175378d81734649567bfe82aac9557f9b0bf48dbd562f26e338b1958fa057472"),
            ("-imagenet21k", "1325f35f0d8dff3270d6ce645f81865e9b8de7bacf17f94a9f5e2ef0cd66f56d"),
            ("-places365", "4d3ef700eb0d454c9406e9b5c11f70106b46ed4a6ca24c1d89a60097ad78ea9a"),
            ("-inat21", "25befb5a460cc80a5a7961db61e747916461bf6967f3d39d9294ee474bd31304"),
            ("-inat21-224px", "fb98a4f29a1c6e552a4e22eaf614b0f2d2adedefe2d510fa7e69309208dc0f9f"),
            (
                "-intermediate-eu-common",
                "5f9529dbb354ac755ee7c584fdc9227f469233ca35a09998ddf57afa54199e44",
            ),
        ),
    ),
    # the one whose published sha256 was not at hand
    *_birder("B", "rope_vit_reg8_b14_nps_avg_capi-dino-bio", (("", ""),)),
    *_birder(
        "So150M",
        "rope_vit_reg8_so150m_p14_swiglu_rms",
        (
            ("_avg_capi", "84808bdb7a46c70eb13a67a766c2c3c9a4a9a37a90679e03fd75619aa5517e80"),
            ("_ap_rotnet-capi", "57465120826faa1e61accfb0e51b529c6ae431cc1f6960e4cdd5278d8dbd1edf"),
        ),
    ),
)
ZOO: Mapping[str, ZooEntry] = {entry.name: entry for entry in ZOO_ENTRIES}
"""Every name that `load_encoder` and the commands resolve by themselves."""

_SIZES = {"base": "b", "large": "l", "huge": "h", "twob": "2b"}
# what authors and earlier versions call families, and what they are called here
_STEMS = {
    "data2vec2": "d2v2",
    "maect": "mae-ct",
    "maectaug": "mae-ct-aug",
    "capi-vitl14": "capi-l14",
    "maerefined": "mae-refined",
    "d2v2refined": "d2v2-refined",
    "dbotrefined": "dbot-refined",
    "crossmaerefined": "crossmae-refined",
}


def _spelling(name: str) -> str:
    """What the spellings of a model's name have in common: "mae_twob14" and "MAE-2B14" are one."""
    plain = name.lower().replace("_", "-")
    short = re.sub(r"(base|large|huge|twob)(?=\d\d)", lambda found: _SIZES[found[1]], plain)
    for old, new in _STEMS.items():
        short = re.sub(f"^{old}(?=-)", new, short)
    return short


_BY_SPELLING = {_spelling(name): entry for name, entry in ZOO.items()}


def find_entry(name: str) -> ZooEntry | None:
    """The checkpoint that a name means, however it is spelled; None where there is none.

    `mae_refined_twob14` is `mae-refined-2b14`, `data2vec2_large16` is `d2v2-l16`.
    """
    return ZOO.get(name) or _BY_SPELLING.get(_spelling(name))


def fetch(entry: ZooEntry | str, folder: Path | None = None) -> Path:
    """The local file of an entry, downloaded if it is not there yet, its sha256 checked if it is.

    Args:
        entry: an entry, or its name.
        folder: where to keep the file and its record; None is `$HF_HOME/mim_refiner_hf`. Processes
            may ask at the same time.

    Raises:
        CheckpointError: for an unknown name, without a connection (or with `HF_HUB_OFFLINE=1`),
            for an answer that is no file, for a file that has not the sha256 that its authors
            publish, and when the disk is full. What has arrived is kept; the message says how to
            go on.
        ConnectionError: the Hub does not answer, not even asked again.
    """
    if isinstance(entry, str):
        found = find_entry(entry)
        if found is None:
            raise CheckpointError(f"{entry!r} is not a name of the zoo; allowed: {', '.join(ZOO)}")
        entry = found

    if folder is None:
        folder = Path(constants.HF_HOME, "mim_refiner_hf")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _file_name(entry, folder)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if entry.url:
                kept = download(entry.url, path)
            else:
                kept = _fetch_from_hub(entry.name, entry.repo, entry.filename, path)
            _check_published(entry, kept, path)
            return kept
    except ConnectionError:
        raise
    # of this disk: what the network does is caught where it happens
    except OSError as error:
        raise CheckpointError(
            f"{entry.name} cannot be kept in {folder}: {error}; free space there or set HF_HOME to "
            "another disk, then run the same command again"
        ) from error


def _file_name(entry: ZooEntry, folder: Path) -> str:
    """What a file is called in `folder`: as the entry, or as an earlier version spelled it.

    Gigabytes that lie there under an old name, or a part of them, are not downloaded again.
    """
    suffix = Path(entry.url or entry.filename).suffix
    for path in sorted(folder.glob(f"*{suffix}*")):
        # itself, a part of it, or the record of a file in the Hub's cache
        stem = re.sub(r"\.(part|json)$", "", path.name).removesuffix(suffix)
        if _spelling(stem) == _spelling(entry.name):
            return stem + suffix
    return entry.name + suffix


def _check_published(entry: ZooEntry, kept: Path, path: Path) -> None:
    """CheckpointError where the file is not the one that its authors publish a sha256 of.

    Both ways of downloading have written what they got into the record of `path`.
    """
    got = Record.read(path).sha256
    if entry.sha256 and got != entry.sha256:
        raise CheckpointError(
            f"{entry.name}: {kept} has the sha256 {got or 'nobody knows'}, but its authors publish "
            f"{entry.sha256}; delete the file and run the same command again"
        )


def _fetch_from_hub(name: str, repo: str, filename: str, path: Path) -> Path:
    """The file in the Hub cache, which resumes by itself, checked at every use.

    Its record lies where that of `path` would.
    """
    try:
        kept = Path(patiently(lambda: hf_hub_download(repo, filename), f"loading {name}")).resolve()

        # the Hub cache keeps one file for each version, so another path is another version
        record = Record.read(path)
        if record.url == str(kept):
            if record.describes(kept):
                return kept
            kept = Path(hf_hub_download(repo, filename, force_download=True)).resolve()
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: the Hub does not answer ({error}); check the name and the "
            "network, and run the same command again later"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: the Hub did not deliver {repo}/{filename}: {first_line}"
        ) from error

    Record(str(kept), size=kept.stat().st_size, sha256=sha256_of(kept)).write(path)
    return kept

"""The zoo: official checkpoints by name. `fetch` downloads a file once and checks it at every use.

    from mim_refiner_hf import load_encoder
    encoder = load_encoder("d2v2_refined_h14")           # or: mim-refiner convert d2v2_refined_h14 d2v2-refined-h14

    from mim_refiner_hf.conversion.zoo import ZOO, fetch
    path = fetch("mae_refined_l16")                      # ~/.cache/huggingface/mim_refiner_hf/mae_refined_l16.th

Files lie under `HF_HOME`, each beside a JSON record of its address, size and sha256 (`download.py`). The authors publish no
checksums, so the recorded sha256 is that of the first download. `facebook/data2vec-vision-base` and `-large` need no entry: they
are model folders on the Hub under these very names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..runtime.files import CheckpointError, sha256_of
from ..runtime.retry import patiently
from .download import Record, download, is_intact


@dataclass(frozen=True)
class ZooEntry:
    """One official checkpoint and where it lives: a `url`, or the `filename` in the Hub repository `repo`.

    Args:
        name: what users type.
        title: for readers.
        family: its layout, a `family` of `layouts.LAYOUTS`.
        architecture: "ViT-L/16", "ViT-H/14", "ViT-2B/14", ...
        url: address of the file; empty where it lies on the Hub.
        repo: "user/name" on the Hub.
        filename: path within `repo`.
        licence: Hub identifier of the licence that the authors state for the weights; None where their pages name none.
    """

    name: str
    title: str
    family: str
    architecture: str
    url: str = ""
    repo: str = ""
    filename: str = ""
    licence: str | None = None

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.architecture.rpartition("/")[2])


REFINED = "https://ml.jku.at/research/mimrefiner/download"
MAE_CT = "https://ml.jku.at/research/maect/download"
META = "https://dl.fbaipublicfiles.com"
DBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/mmodal/dbot"
PRE, POST = "mim_refiner_prenorm", "mim_refiner_postnorm"
BY_NC = "cc-by-nc-4.0"

ENTRIES = (
    ZooEntry("mae_refined_l16", "MAE-Refined", PRE, "ViT-L/16", f"{REFINED}/maerefined_l16.th"),
    ZooEntry("mae_refined_h14", "MAE-Refined", PRE, "ViT-H/14", f"{REFINED}/maerefined_h14.th"),
    ZooEntry(
        "mae_refined_twob14", "MAE-Refined", PRE, "ViT-2B/14", f"{REFINED}/maerefined_twob14.th"
    ),
    ZooEntry("d2v2_refined_l16", "D2V2-Refined", POST, "ViT-L/16", f"{REFINED}/d2v2refined_l16.th"),
    ZooEntry("d2v2_refined_h14", "D2V2-Refined", POST, "ViT-H/14", f"{REFINED}/d2v2refined_h14.th"),
    ZooEntry("dbot_refined_l16", "dBOT-Refined", PRE, "ViT-L/16", f"{REFINED}/dbotrefined_l16.th"),
    ZooEntry("dbot_refined_h14", "dBOT-Refined", PRE, "ViT-H/14", f"{REFINED}/dbotrefined_h14.th"),
    ZooEntry(
        "crossmae_refined_l16",
        "CrossMAE-Refined",
        PRE,
        "ViT-L/16",
        f"{REFINED}/crossmaerefined_l16.th",
    ),
    *(
        ZooEntry(f"{kind}_{size}", title, PRE, architecture, f"{MAE_CT}/{kind}_{size}.th")
        for kind, title in (("maect", "MAE-CT"), ("maectaug", "MAE-CT with colour augmentations"))
        for size, architecture in (
            ("base16", "ViT-B/16"),
            ("large16", "ViT-L/16"),
            ("huge16", "ViT-H/16"),
            ("huge14", "ViT-H/14"),
        )
    ),
    ZooEntry(
        "mae_base16",
        "MAE",
        "mae",
        "ViT-B/16",
        f"{META}/mae/pretrain/mae_pretrain_vit_base.pth",
        licence=BY_NC,
    ),
    ZooEntry(
        "mae_large16",
        "MAE",
        "mae",
        "ViT-L/16",
        f"{META}/mae/pretrain/mae_pretrain_vit_large.pth",
        licence=BY_NC,
    ),
    ZooEntry(
        "mae_huge14",
        "MAE",
        "mae",
        "ViT-H/14",
        f"{META}/mae/pretrain/mae_pretrain_vit_huge.pth",
        licence=BY_NC,
    ),
    ZooEntry(
        "mae_twob14",
        "MAE",
        "plain_vit",
        "ViT-2B/14",
        f"{META}/maws/pretrain/mae_in1k/vit_2b14.pt",
        licence=BY_NC,
    ),
    *(
        ZooEntry(
            f"data2vec2_{size}",
            "data2vec 2.0",
            "data2vec2",
            architecture,
            f"{META}/fairseq/data2vec2/{file}",
            licence="mit",
        )
        for size, architecture, file in (
            ("base16", "ViT-B/16", "base_imagenet.pt"),
            ("large16", "ViT-L/16", "large_imagenet.pt"),
            ("huge14", "ViT-H/14", "huge_imagenet.pt"),
        )
    ),
    ZooEntry(
        "dbot_large16",
        "dBOT",
        "dbot",
        "ViT-L/16",
        f"{DBOT}/86.6_dbot_large_pre.pth",
        licence="apache-2.0",
    ),
    ZooEntry(
        "dbot_huge14",
        "dBOT",
        "dbot",
        "ViT-H/14",
        f"{DBOT}/87.4_dbot_huge_pre.pth",
        licence="apache-2.0",
    ),
    ZooEntry(
        "crossmae_large16",
        "CrossMAE",
        "crossmae",
        "ViT-L/16",
        repo="longlian/CrossMAE",
        filename="vitl-mr0.75-kmr0.75-dd12/imagenet-mae-cross-vitl-pretrain-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth",
        licence=BY_NC,
    ),
    *(
        ZooEntry(
            f"capi_vitl14_{data}",
            f"CAPI on {title}",
            "capi",
            "ViT-L/14",
            f"{META}/capi/{file}.pth",
            licence="apache-2.0",
        )
        for data, title, file in (
            ("p205", "Places205", "capi_vitl14_p205"),
            ("lvd", "LVD-142M", "capi_vitl14_lvd"),
            ("in22k", "ImageNet-22k", "capi_vitl14_i22k"),
            ("in1k", "ImageNet-1K", "capi_vitl14_in1k"),
        )
    ),
)
ZOO: Mapping[str, ZooEntry] = {entry.name: entry for entry in ENTRIES}
"""Every name that `load_encoder` and the commands resolve by themselves."""


def fetch(entry: ZooEntry | str, folder: Path | None = None) -> Path:
    """The local file of an entry, downloaded if it is not there yet, its sha256 checked if it is.

    Args:
        entry: an entry, or its name.
        folder: where to keep the file and its record; None is `$HF_HOME/mim_refiner_hf`. Processes may ask at the same time.

    Raises:
        CheckpointError: for an unknown name, without a connection (or with `HF_HUB_OFFLINE=1`), for an answer that is no file, and
            when the disk is full. What has arrived is kept; the message says how to go on.
        ConnectionError: the Hub does not answer, not even asked again.
    """
    if isinstance(entry, str):
        if entry not in ZOO:
            raise CheckpointError(f"{entry!r} is not a name of the zoo; allowed: {', '.join(ZOO)}")
        entry = ZOO[entry]
    folder = Path(constants.HF_HOME, "mim_refiner_hf") if folder is None else folder
    path = folder / (entry.name + Path(entry.url or entry.filename).suffix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            return fetch_from_hub(entry, path) if entry.repo else download(entry.url, path)
    except ConnectionError:
        raise
    except OSError as error:  # of this disk: what the network does is caught where it happens
        raise CheckpointError(
            f"{entry.name} cannot be kept in {folder}: {error}; free space there or set HF_HOME to another disk, then run the same "
            "command again"
        ) from error


def fetch_from_hub(entry: ZooEntry, path: Path) -> Path:
    """The file in the Hub cache, which resumes by itself; its record lies where that of `path` would. Checked at every use."""
    try:
        kept = Path(
            patiently(lambda: hf_hub_download(entry.repo, entry.filename), f"loading {entry.name}")
        ).resolve()
        record = Record.read(path)
        known = record is not None and record.url == str(
            kept
        )  # the Hub cache keeps one file per version
        if known and not is_intact(kept, record):
            kept, known = (
                Path(hf_hub_download(entry.repo, entry.filename, force_download=True)).resolve(),
                False,
            )
    except ConnectionError as error:
        raise ConnectionError(
            f"{entry.name}: the Hub does not answer ({error}); run the same command again later"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{entry.name}: the Hub did not deliver {entry.repo}/{entry.filename}: {first_line}"
        ) from error
    if not known:
        Record(str(kept), size=kept.stat().st_size, sha256=sha256_of(kept)).write(path)
    return kept


__all__ = ["ZOO", "ZooEntry", "fetch"]

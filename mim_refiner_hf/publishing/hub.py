"""A model folder that loads with and without this package, and its way to the Hub.

    from mim_refiner_hf.publishing import push_folder, save_model_folder
    save_model_folder(Path("out/model"), encoder, processor)
    push_folder(Path("out/model"), "user/mae-refined-l16")
    # or: mim-refiner push out/model user/mae-refined-l16

With the package imported, `AutoModel`, `AutoImageProcessor` and `pipeline` load the folder with no
flag; without it they need `trust_remote_code=True` and run the Python files that lie in the folder.
"""

import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.dynamic_module_utils import get_relative_import_files

from ..clustering.pipeline_image_clustering import announce_code
from ..conversion.digests import add_file_digests, write_digests
from ..conversion.licence import CARD, agreed_licence, licence_beside
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.ending import CommandFailure
from ..runtime.files import STAGED, check_folder, refuse_no_model_folder, staged_folder
from ..runtime.finite import check_finite
from ..runtime.quiet import without_bars
from ..runtime.retry import patiently
from ..runtime.wording import setting
from .card_licence import state_licence
from .model_card import REPO_PLACEHOLDER
from .sentence_files import write_sentence_files

# of a file of weights; so that writing takes no second copy of them all
MAX_SHARD_SIZE = "2GB"
# the files that config.json names; what they import of their flat neighbours travels with them
_TRAVELLING = (
    "model/modeling_mim_refiner.py",
    "model/image_processing_mim_refiner.py",
    "clustering/pipeline_image_clustering.py",
)


class PushError(CommandFailure):
    """The Hub did not take the upload; nothing local changed, and the message says how to go on."""


def check_model_folder(folder: Path) -> Path:
    """`folder`, resolved, if a model can be written there; else a ValueError.

    It can where the folder is absent, empty or holds a model.
    """
    return check_folder(folder, "config.json", "model")


def save_model_folder(folder: Path, encoder: MimRefinerModel, processor: Any) -> None:
    """Write weights (fp32), configuration, preprocessing and the code they need, all or nothing.

    An earlier model in `folder` is replaced, card included: it described other weights.

    Raises:
        ValueError: when `folder` exists and holds something other than a model.
    """
    with staged_folder(folder, check_model_folder) as new:
        write_model(new, encoder, processor, torch.float32)


def write_model(folder: Path, encoder: MimRefinerModel, processor: Any, dtype: torch.dtype) -> None:
    """Write a model's files into an empty folder, its weights cast to `dtype`.

    `config.json`, safetensors, `preprocessor_config.json`, the flat Python files, what
    sentence-transformers reads, and a digest of every tensor and of the first two JSON files, by
    which `load_encoder` notices any later change.

    Raises:
        NotFiniteTensorError: for weights that hold NaN or infinity, or do so in `dtype`.
    """
    weights = {}
    for name, tensor in encoder.state_dict().items():
        weights[name] = tensor.detach().to("cpu", dtype)

    remedy = f"get or train it anew, or take {setting('dtype', 'float32')} where float16 overflows"
    check_finite(weights, f"the model {folder.name.removeprefix(STAGED)}", remedy)
    # digests first: saving takes the tensors out of `weights` one by one
    write_digests(folder, weights)
    with without_bars():
        encoder.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
    processor.save_pretrained(folder)
    announce_code(folder, dtype=str(dtype).removeprefix("torch."))
    add_file_digests(folder)
    write_sentence_files(folder)

    package = Path(__file__).resolve().parents[1]
    for name in _TRAVELLING:
        module = package / name
        for file in (module, *map(Path, get_relative_import_files(module))):
            shutil.copyfile(file, folder / file.name)


def check_repo_id(repo_id: str) -> str:
    """`repo_id` itself if it has the form "user/name" that the Hub accepts, else a ValueError."""
    wrong = ValueError(
        f"{repo_id!r} is not the name of a Hub repository; give user/name or organisation/name, "
        "with letters, digits, '-', '_' and '.', such as ada/mae-refined-l16"
    )
    if repo_id.count("/") != 1:
        raise wrong
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise wrong from error
    return repo_id


def push_folder(
    folder: Path, repo_id: str, *, private: bool = False, license: str | None = None
) -> str:
    """Upload a model folder: weights, configuration and code in one commit, the card in a second.

    The card comes last so that no page ever describes weights that are not there. Uploading again
    is safe: files that the Hub already has are not sent twice. Trouble that may pass is waited out
    a few times (runtime/retry.py).

    Args:
        folder: as `save_model_folder` and `write_card` leave it; README.md may be missing.
        repo_id: "user/name"; created when it does not exist.
        private: for a new repository.
        license: of the weights, where the card states none; it is put into the card.

    Returns:
        The address of the repository.

    Raises:
        ValueError: for a malformed `repo_id`, and for a licence that is not known or not that of
            the card; before anything is sent.
        FileNotFoundError: when `folder` holds no model.
        PushError: when the Hub cannot be reached or refuses; nothing local is changed.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    refuse_no_model_folder(folder)

    found = licence_beside(folder)
    licence = agreed_licence(found, license, folder, publish=True)
    if licence != found:
        state_licence(folder, licence)

    try:
        return _upload(folder, repo_id, private)
    # network, authentication, quota, card validation: each has its own class, all end the same way
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        again = ["mim-refiner", "push", str(folder), repo_id]
        if private:
            again.append("--private")
        raise PushError(
            f"the Hub did not take {repo_id} ({reason}); the local result is intact at {folder}, "
            f"continue with: {shlex.join(again)}"
        ) from error


def _upload(folder: Path, repo_id: str, private: bool) -> str:
    """What `push_folder` does, with the Hub's own errors."""
    api = HfApi()
    create = partial(api.create_repo, repo_id, private=private, exist_ok=True)
    url = patiently(create, f"making {repo_id}")

    upload_model = partial(
        api.upload_folder,
        folder_path=folder,
        repo_id=repo_id,
        ignore_patterns=[CARD, ".tmp*", ".*.tmp", ".old*", ".git*", ".cache*"],
        commit_message="Weights, configuration and code",
    )
    patiently(upload_model, f"uploading to {repo_id}")

    card = folder / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace(REPO_PLACEHOLDER, repo_id)
        upload_card = partial(
            api.upload_file,
            path_or_fileobj=text.encode(),
            path_in_repo=CARD,
            repo_id=repo_id,
            commit_message="Model card with metrics",
        )
        patiently(upload_card, f"uploading the card of {repo_id}")
    return str(url)

"""A model folder that loads with and without this package, and its way to the Hub.

    from mim_refiner_hf.publishing import push_folder, save_model_folder
    save_model_folder(Path("out/model"), encoder, processor)
    push_folder(Path("out/model"), "user/mae-refined-l16")             # or: mim-refiner push out/model user/mae-refined-l16

With the package imported, `AutoModel`, `AutoImageProcessor` and `pipeline` load the folder with no flag; without it they need
`trust_remote_code=True` and run the Python files that lie in the folder.
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
from ..model.modeling_mim_refiner import MimRefinerModel
from ..runtime.files import check_folder, staged_folder
from ..runtime.retry import patiently
from .model_card import REPO_PLACEHOLDER

CARD = "README.md"
SHARD_SIZE = "2GB"
ENTRIES = (
    "model/modeling_mim_refiner.py",
    "model/image_processing_mim_refiner.py",
    "clustering/pipeline_image_clustering.py",
)
"""The modules that config.json names; what they import of their flat neighbours travels with them."""


class PushError(RuntimeError):
    """The Hub did not take the upload; the local folder is intact and the message says how to continue."""


def check_model_folder(folder: Path) -> Path:
    """`folder`, resolved, if a model can be written there: it is absent, empty or holds a model; else a ValueError."""
    return check_folder(folder, "config.json", "model")


def save_model_folder(folder: Path, encoder: MimRefinerModel, processor: Any) -> None:
    """Write weights (fp32), configuration, preprocessing and the code they need into `folder`, all or nothing.

    An earlier model in `folder` is replaced, card included: it described other weights.

    Raises:
        ValueError: when `folder` exists and holds something other than a model.
    """
    with staged_folder(folder, check_model_folder) as new:
        write_model(new, encoder, processor, torch.float32)


def write_model(folder: Path, encoder: MimRefinerModel, processor: Any, dtype: torch.dtype) -> None:
    """Write a model's files into an empty folder: `config.json`, safetensors, `preprocessor_config.json`, the flat Python files,
    and a digest of every tensor and of the two JSON files, by which `load_encoder` notices any later change.

    Weights are cast to `dtype` and split into files of at most `SHARD_SIZE`, so that writing takes no second copy of them all.
    """
    weights = {
        name: tensor.detach().to("cpu", dtype) for name, tensor in encoder.state_dict().items()
    }
    write_digests(folder, weights)  # first: saving takes the tensors out of `weights` one by one
    encoder.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
    processor.save_pretrained(folder)
    announce_code(folder, dtype=str(dtype).removeprefix("torch."))
    add_file_digests(folder)
    package = Path(__file__).resolve().parents[1]
    for entry in (package / module for module in ENTRIES):
        for file in (entry, *map(Path, get_relative_import_files(entry))):
            shutil.copyfile(file, folder / file.name)


def check_repo_id(repo_id: str) -> str:
    """`repo_id` itself if it has the form "user/name" that the Hub accepts, else a ValueError."""
    hint = "give user/name or organisation/name, with letters, digits, '-', '_' and '.', such as ada/mae-refined-l16"
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is not the name of a Hub repository; {hint}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the name of a Hub repository; {hint}") from error
    return repo_id


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a model folder: weights, configuration and code in one commit, then the card in a second one.

    The card comes last so that no page ever describes weights that are not there. Uploading again is safe: files that the
    Hub already has are not sent twice. Trouble that may pass is waited out a few times (`patience.py`).

    Args:
        folder: as `save_model_folder` and `write_card` leave it; a missing README.md is left out.
        repo_id: "user/name"; created when it does not exist.
        private: for a new repository.

    Returns:
        The address of the repository.

    Raises:
        ValueError: for a malformed `repo_id`.
        FileNotFoundError: when `folder` holds no model.
        PushError: when the Hub cannot be reached or refuses; nothing local is changed.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    if missing := [
        name for name in ("config.json", "model*.safetensors") if not any(folder.glob(name))
    ]:
        raise FileNotFoundError(
            f"{folder} is not a model folder: {' and '.join(missing)} missing; give the run's model folder"
        )
    api = HfApi()
    try:
        url = patiently(
            lambda: api.create_repo(repo_id, private=private, exist_ok=True), f"making {repo_id}"
        )
        upload = partial(
            api.upload_folder,
            folder_path=folder,
            repo_id=repo_id,
            ignore_patterns=[CARD, ".tmp*", ".*.tmp", ".old*", ".git*", ".cache*"],
            commit_message="Weights, configuration and code",
        )
        patiently(upload, f"uploading to {repo_id}")
        if (folder / CARD).is_file():
            card = (folder / CARD).read_text(encoding="utf-8").replace(REPO_PLACEHOLDER, repo_id)
            upload = partial(
                api.upload_file,
                path_or_fileobj=card.encode(),
                path_in_repo=CARD,
                repo_id=repo_id,
                commit_message="Model card with metrics",
            )
            patiently(upload, f"uploading the card of {repo_id}")
    except Exception as error:  # network, authentication, quota, card validation: each has its own class, all end the same way
        reason = " ".join(str(error).split()) or type(error).__name__
        again = shlex.join(
            ["mim-refiner", "push", str(folder), repo_id, *(["--private"] if private else [])]
        )
        raise PushError(
            f"the Hub did not take {repo_id} ({reason}); the local result is intact at {folder}, continue with: {again}"
        ) from error
    return str(url)


__all__ = [
    "PushError",
    "check_model_folder",
    "check_repo_id",
    "push_folder",
    "save_model_folder",
    "write_model",
]

"""Damage to files, and what reading them says.

One typed line that names file and remedy, or the same result as before. Nothing else.

    python -m tests.damage --cases 1000 --json damage.json

The table that it prints is in benchmarks/results/damage.md.

Every target is a small folder written by this package, with the reader that a user would meet: a
training checkpoint, the same with a manifest that vouches for wrong tensors, a model folder, a
run's data record, images. A case damages one file, drawn from a seed, and reads. Damage that
changes nothing, as bytes behind the end of an image, is drawn again.
"""

import argparse
import hashlib
import io
import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_refiner_hf.clustering.decoding import decode_image
from mim_refiner_hf.conversion import load_encoder
from mim_refiner_hf.data.fingerprint import RECORD, check_data_record, write_data_record
from mim_refiner_hf.data.images import open_images
from mim_refiner_hf.model.configuration_mim_refiner import MimRefinerConfig
from mim_refiner_hf.model.image_processing_mim_refiner import MimRefinerImageProcessor
from mim_refiner_hf.model.modeling_mim_refiner import MimRefinerModel
from mim_refiner_hf.publishing import save_model_folder
from mim_refiner_hf.runtime.checkpoint import (
    check_tensors,
    load_latest,
    read_checkpoint,
    save_checkpoint,
)
from mim_refiner_hf.runtime.files import CheckpointError

State = dict[str, Tensor]
REMEDY = (
    r"\b(get .* again|remove it|remove its|replace or remove|delete its|name another|"
    r"Put it back|start the run anew|give the file)"
)

# --- damage to tensors ----------------------------------------------------------------------------


def dropped(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


def renamed(state: State, name: str) -> State:
    return {f"{key}_x" if key == name else key: tensor for key, tensor in state.items()}


def transposed(state: State, name: str) -> State | None:
    """The first two dimensions that differ exchanged; None where the shape stays the same."""
    tensor = state[name]
    pairs = [(i, i + 1) for i in range(tensor.ndim - 1) if tensor.shape[i] != tensor.shape[i + 1]]
    return state | {name: tensor.transpose(*pairs[-1]).contiguous()} if pairs else None


def integer(state: State, name: str) -> State:
    return state | {name: (state[name] * 100).int()}


def with_nan(state: State, name: str) -> State:
    tensor = state[name].clone()
    tensor.view(-1)[-1] = float("nan")
    return state | {name: tensor}


def swapped(state: State, name: str) -> State | None:
    """Under each other's names with the next tensor of another shape."""
    names = list(state)
    others = [
        key for key in names[names.index(name) :] + names if state[key].shape != state[name].shape
    ]
    return state | {name: state[others[0]], others[0]: state[name]}


TENSOR_DAMAGES: list[Callable[[State, str], State | None]] = [
    dropped,
    renamed,
    transposed,
    integer,
    with_nan,
    swapped,
]

# --- damage to bytes ------------------------------------------------------------------------------

Bytes = Callable[[bytes, np.random.Generator], bytes | None]
PAGE = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def flipped(content: bytes, rng: np.random.Generator, bits: int = 1) -> bytes:
    damaged = np.frombuffer(content, np.uint8).copy()
    for place in rng.integers(len(content), size=bits):
        damaged[place] ^= 1 << rng.integers(8)
    return damaged.tobytes()


def zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    """A lost block of a disk: up to 512 bytes."""
    start = int(rng.integers(len(content)))
    end = min(start + 512, len(content))
    return content[:start] + bytes(end - start) + content[end:]


def exchanged(content: bytes, rng: np.random.Generator) -> bytes:
    """Two blocks in each other's place."""
    size = max(len(content) // 8, 1)
    first, second = sorted(
        int(place) * size for place in rng.choice(max(len(content) // size, 2), 2, replace=False)
    )
    a, b = content[first : first + size], content[second : second + size]
    return content[:first] + b + content[first + size : second] + a + content[second + size :]


BYTE_DAMAGES: dict[str, Bytes] = {
    "one bit flipped": flipped,
    "20 bits flipped": lambda content, rng: flipped(content, rng, 20),
    "truncated": lambda content, rng: content[: int(rng.integers(1, len(content)))],
    "empty": lambda content, rng: b"",
    "a block of zeros": zeroed,
    "two blocks exchanged": exchanged,
    "bytes appended": lambda content, rng: content + rng.bytes(int(rng.integers(1, 100))),
    "noise": lambda content, rng: rng.bytes(len(content)),
    "a web page instead": lambda content, rng: PAGE,
    "a git-lfs pointer instead": lambda content, rng: POINTER,
    "gone": lambda content, rng: None,
}
LOST = tuple(name for name in BYTE_DAMAGES if "flipped" not in name and "block" not in name)
"""What can be told of an image without a checksum.

JPEG, GIF, TIFF and WebP decode flipped bits to other pixels.
"""

# --- targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A folder and its reader: `read` gives a digest of all that it read.

    `files` may be damaged in the ways that `damages` names; `rewrite` damages tensors behind a
    manifest that vouches for them.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], str]
    files: tuple[str, ...]
    damages: tuple[str, ...] = tuple(BYTE_DAMAGES)
    rewrite: Callable[[Path, State], None] | None = None
    error: type[ValueError] = CheckpointError


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def values(state: Mapping[str, Tensor]) -> list[tuple[str, str, bytes]]:
    return [
        (name, str(tensor.dtype), tensor.numpy().tobytes())
        for name, tensor in sorted(state.items())
    ]


def tiny_encoder() -> MimRefinerModel:
    torch.manual_seed(1)
    config = MimRefinerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    encoder = MimRefinerModel(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return encoder.eval()


def checkpoint_tensors() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(6, 4, generator=generator),
        "bias": torch.randn(6, generator=generator),
    }


def write_checkpoint(folder: Path, tensors: State | None = None) -> None:
    state = {"seconds": {"warmup": 1.5}, "before": None, "recipe": {"model": "a", "seed": 0}}
    save_checkpoint(folder, step=20, tensors=tensors or checkpoint_tensors(), state=state, keep=1)


def read_the_checkpoint(folder: Path) -> str:
    found = read_checkpoint(folder / "step-00000020")
    check_tensors(found, checkpoint_tensors())
    assert load_latest(folder) is not None
    return digest(found.step, found.state, values(found.tensors))


def read_the_model(folder: Path) -> str:
    encoder = load_encoder(folder)
    processor = vars(encoder)["image_processor"]
    settings = {
        key: value for key, value in encoder.config.to_dict().items() if key != "_name_or_path"
    }
    return digest(
        values(encoder.state_dict()), sorted(settings.items(), key=str), processor.to_json_string()
    )


def write_record(folder: Path) -> None:
    write_data_record(folder / RECORD, open_images("digits"))


def read_the_record(folder: Path) -> str:
    check_data_record(folder / RECORD, open_images("digits"))
    return ""


def picture(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((96, 96)).save(buffer, kind)
    return buffer.getvalue()


def image_target(kind: str) -> Target:
    file = f"photo.{kind.lower()}"
    return Target(
        f"image, {kind}",
        lambda folder: (folder / file).write_bytes(picture(kind)) and None,
        lambda folder: digest(decode_image(folder / file).tobytes()),
        (file,),
        tuple(BYTE_DAMAGES) if kind == "PNG" else LOST,
        error=ValueError,
    )


CHECKPOINT_FILES = tuple(
    f"step-00000020/{name}" for name in ("tensors.safetensors", "state.json", "manifest.json")
)
MODEL_FILES = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "weights_digests.json",
)
TARGETS = [
    Target("training checkpoint", write_checkpoint, read_the_checkpoint, CHECKPOINT_FILES),
    Target(
        "checkpoint, vouched for",
        write_checkpoint,
        read_the_checkpoint,
        (),
        rewrite=write_checkpoint,
    ),
    Target(
        "model folder",
        lambda folder: save_model_folder(
            folder / "model", tiny_encoder(), MimRefinerImageProcessor()
        ),
        lambda folder: read_the_model(folder / "model"),
        tuple(f"model/{name}" for name in MODEL_FILES),
    ),
    Target(
        "model, tensors",
        lambda folder: save_model_folder(
            folder / "model", tiny_encoder(), MimRefinerImageProcessor()
        ),
        lambda folder: read_the_model(folder / "model"),
        (),
        rewrite=lambda folder, state: save_file(state, folder / "model/model.safetensors"),
    ),
    Target("data record", write_record, read_the_record, (RECORD,), error=ValueError),
    *(image_target(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")),
]

# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One damage and what reading said; `wrong` says what was wrong with that, "" if nothing."""

    target: str
    damage: str
    file: str
    message: str
    wrong: str


def judge(target: Target, folder: Path, before: str, file: str) -> tuple[str, str] | None:
    """(message, what is wrong with it) of reading damaged files.

    None where the damage changed nothing.
    """
    try:
        return None if target.read(folder) == before else ("", "silent: something else was read")
    # all of them: which errors there are is the point
    except Exception as error:
        message = str(error)
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        raised_in = "" if last is None else last.tb_frame.f_code.co_filename
        if not isinstance(error, target.error) or "mim_refiner_hf" not in raised_in:
            return message, f"not ours: {type(error).__name__} from {Path(raised_in).name}"
        if "\n" in message or not re.search(REMEDY, message):
            return message, "not one line with a remedy"
        names = {str(folder), Path(file).name, *[part for part in Path(file).parts[:1] if part]}
        return message, "" if any(name in message for name in names) else "names no file"


def damage_once(target: Target, folder: Path, before: str, rng: np.random.Generator) -> Case:
    """Damage, read, repair; damage without consequences is drawn again."""
    while True:
        if target.rewrite is None:
            file = str(rng.choice(target.files))
            kind = str(rng.choice(target.damages))
            content = (folder / file).read_bytes()
            damaged = BYTE_DAMAGES[kind](content, rng)
        else:
            file = str(next(folder.rglob("*.safetensors")).relative_to(folder))
            content, state = (folder / file).read_bytes(), load_file(folder / file)
            name, change = (
                str(rng.choice(list(state))),
                TENSOR_DAMAGES[rng.integers(len(TENSOR_DAMAGES))],
            )
            kind, rewritten = change.__name__.replace("_", " "), change(state, name)
            if rewritten is None:
                continue
            target.rewrite(folder, rewritten)
            damaged = None
        if target.rewrite is None:
            (folder / file).unlink() if damaged is None else (folder / file).write_bytes(damaged)
        found = judge(target, folder, before, file)
        if target.rewrite is None:
            (folder / file).write_bytes(content)
        else:
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            target.write(folder)
        if found is not None:
            return Case(target.name, kind, file, *found)


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """So many cases, the targets in turn."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = []
        for number, target in enumerate(TARGETS):
            folder = Path(place) / f"target{number}"
            folder.mkdir()
            target.write(folder)
            prepared.append((target, folder, target.read(folder)))
        for number in range(count):
            yield damage_once(
                *prepared[number % len(TARGETS)], np.random.default_rng([seed, number])
            )


def table(found: list[Case]) -> str:
    """Cases per target and damage, and those that went wrong."""
    counts = Counter((case.target, case.damage) for case in found)
    damages = list(dict.fromkeys(damage for _, damage in counts))
    names = list(dict.fromkeys(target for target, _ in counts))
    lines = [f"| damage | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [
        f"| {damage} | {' | '.join(str(counts[name, damage] or '-') for name in names)} |"
        for damage in sorted(damages)
    ]
    wrong = Counter(case.wrong for case in found if case.wrong)
    lines += [
        "",
        f"{len(found)} cases, {len(found) - wrong.total()} typed lines that name file and remedy, "
        f"{wrong.total()} wrong.",
    ]
    return "\n".join([*lines, *(f"- {reason}: {count}" for reason, count in wrong.items())])


def main() -> int:
    """The command; exit code 1 if any case went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="every case, with what was said")
    options = parser.parse_args()
    found = list(cases(options.cases, options.seed))
    if options.json:
        options.json.write_text(json.dumps([vars(case) for case in found], indent=1))
    print(table(found))
    return int(any(case.wrong for case in found))


if __name__ == "__main__":
    raise SystemExit(main())

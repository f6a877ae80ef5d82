"""The encoder inside what trainers write: wrappers' names taken off, a whole training looked into.

    contents = without_wrappers(torch.load("ddp.pth"))      # no module., no _orig_mod.
    found = inner_encoder("last.ckpt", contents)
    found.prefix, found.contents, found.outside             # "state_dict.model.", tensors, names
    found = teacher_beside("run.pth", contents, "model")    # "model_ema.", where there is one

DDP, `torch.compile`, FSDP and activation checkpointing put a word of their own into every name.
Lightning, mmsegmentation, DINO, DINOv2, lightly and timm keep the encoder under a prefix, with
heads beside it, and some a student and a teacher. An encoder begins where its patch embedding is:
everything below that prefix has to fit one family, everything outside is left behind and named.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..runtime.files import CheckpointError
from ..runtime.text import one_line
from .layout import listed

logger = logging.getLogger(__name__)

# words that say how a module was run, not what it is; "module" is one inside a name only
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_INNER_WRAPPER = ".module."
# every plain ViT of a file without a config.json has it
_BEGINS = "patch_embed.proj.weight"
# of several encoders, the one that is meant to be used
_PREFERRED = re.compile(r"(?:^|[._])(?:teacher|ema|target|momentum)(?:[._]|$)")
# DINOv2 numbers its blocks once more by the chunk in which FSDP holds them
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
# what an optimizer keeps has the names of the weights
_NO_WEIGHTS = re.compile(r"optim|scheduler|scaler|callbacks|loops")


@dataclass(frozen=True)
class InnerEncoder:
    """An encoder below a prefix.

    Attributes:
        contents: its tensors by their own names, beside what the file states of itself.
        prefix: that was in front of them.
        outside: names of the tensors that are left behind.
    """

    contents: Mapping[str, Any]
    prefix: str
    outside: list[str]

    def tell_of_the_rest(self, name: str) -> None:
        """Say how many tensors of the file that its user calls `name` are left behind."""
        if self.outside:
            logger.warning(
                "%s: %d tensors outside %s are left behind: %s",
                name,
                len(self.outside),
                one_line(self.prefix)[:100],
                one_line(listed(self.outside, 3))[:300],
            )


def without_wrappers(contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same nested dictionaries without the wrappers' words in any name.

    As they are where two names would become one.
    """
    cleaned: dict[str, Any] = {}
    for key, value in contents.items():
        inner = without_wrappers(value) if isinstance(value, Mapping) else value
        words = str(key).split(".")
        kept = [word for word in words if word not in _WRAPPERS]
        if len(kept) == len(words):
            own = {key: inner}
        elif kept:
            own = {".".join(kept): inner}
        elif isinstance(inner, Mapping):
            own = dict(inner)
        else:
            own = {key: inner}

        if cleaned.keys() & own.keys():
            return contents
        cleaned |= own
    return cleaned


def named_tensors(contents: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries in file order, names joined by dots."""
    for key, value in contents.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{prefix}{key}.")


def inner_encoder(name: str, contents: Mapping[str, Any]) -> InnerEncoder | None:
    """The one encoder somewhere inside a file that its user calls `name`; None without any.

    Of several, the teacher's: the one whose prefix says teacher, EMA, target or momentum.

    Raises:
        CheckpointError: for several encoders of which none, or more than one, is a teacher's.
    """
    tensors = _weights(contents)
    prefixes = _beginnings(tensors)
    if not prefixes:
        return None
    if len(prefixes) > 1:
        preferred = [prefix for prefix in prefixes if _PREFERRED.search(prefix)]
        if len(preferred) != 1:
            raise _several(name, prefixes)
        prefixes = preferred
    return _below(prefixes[0], contents, tensors)


def teacher_beside(name: str, contents: Mapping[str, Any], where: str) -> InnerEncoder | None:
    """The teacher's encoder beside the one that was found under `where`; None without any.

    Such as `model_ema` beside `model`, or `ema_state_dict` beside `state_dict`. Other encoders that
    lie beside it are left behind, which a line says.

    Args:
        where: keys joined by dots; empty for the file's top level, beside which nothing lies.

    Raises:
        CheckpointError: for several teachers.
    """
    if not where or _PREFERRED.search(where):
        return None

    tensors = _weights(contents)
    beside = [prefix for prefix in _beginnings(tensors) if not prefix.startswith(f"{where}.")]
    teachers = [prefix for prefix in beside if _PREFERRED.search(prefix)]
    if len(teachers) > 1:
        raise _several(name, teachers)
    if teachers:
        return _below(teachers[0], contents, tensors)

    if beside:
        shown = one_line(listed([prefix[:100] for prefix in beside], 3))
        logger.warning(
            "%s: the encoder under %s. is read; those under %s are left behind", name, where, shown
        )
    return None


def _weights(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors but the optimizer's, by their names joined with dots."""
    weights = {}
    for key, value in contents.items():
        if isinstance(value, Tensor) or not _NO_WEIGHTS.search(str(key)):
            weights[key] = value
    return dict(named_tensors(weights))


def _beginnings(tensors: Mapping[str, Tensor]) -> list[str]:
    """The prefixes below which an encoder begins."""
    prefixes = [key.removesuffix(_BEGINS) for key in tensors if key.endswith(_BEGINS)]
    return [prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")]


def _several(name: str, prefixes: list[str]) -> CheckpointError:
    shown = listed([one_line(prefix)[:100] for prefix in prefixes])
    return CheckpointError(
        f"{name} holds {len(prefixes)} encoders, under {shown}; save the tensors of one of them "
        "alone"
    )


def _below(prefix: str, contents: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> InnerEncoder:
    """What lies below a prefix, by its own names."""
    own = {}
    outside = []
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            outside.append(key)
            continue
        plain = key.removeprefix(prefix).replace(_INNER_WRAPPER, ".")
        own[_CHUNKED.sub(r"blocks.\1.", plain)] = tensor
    stated = {key: contents[key] for key in ("args", "ctor_kwargs") if key in contents}
    return InnerEncoder({**stated, **own}, prefix, outside)

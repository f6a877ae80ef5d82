"""NaN and infinity are not stored: asked of weights before they are written anywhere.

    check_finite(encoder.state_dict(), "out/model", "lower learning_rate")
    # NotFiniteTensorError: out/model is not written: 2 of 150 tensors hold NaN or infinity, ...

Features have a check of their own, which names the image (`evaluation/shard_files.py`).
"""

from collections.abc import Mapping

from torch import Tensor


class NotFiniteTensorError(FloatingPointError):
    """Something that was to be stored holds NaN or infinity; it was not stored."""


def check_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raise unless every value of every tensor is finite; whole numbers always are.

    Args:
        what: is to be written, for the message.
        remedy: what to do, the end of the sentence.

    Raises:
        NotFiniteTensorError: how many tensors are not, which is the first, and the remedy.
    """
    wrong = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            wrong.append(name)
    if not wrong:
        return

    first = tensors[wrong[0]]
    count = int((~first.isfinite()).sum())
    raise NotFiniteTensorError(
        f"{what} is not written: {len(wrong)} of {len(tensors)} tensors hold NaN or infinity, "
        f"first {wrong[0]} ({count} of its {first.numel()} values); {remedy}"
    )

"""What a step costs, counted as it runs.

Launched operations, waits for the device, and the peak of live tensor bytes.
"""

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = {
    "empty",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "promote_types",
    "lift_fresh",
}  # nothing is launched
# the host has to know the result
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
}


class Launches(TorchDispatchMode):
    """Counts the operations that a device would have to run: no views, no mere allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE | {"detach", "_reshape_alias"}:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made within, now and at most.

    Exact, and with fake tensors without any memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and id(storage := tensor.untyped_storage()) not in self.sizes
            ):
                self.sizes[id(storage)] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, id(storage))
        return result

"""Counts the operations of torch that are kernels on a GPU: each is a launch there, also a small one."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = (
    "view",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "expand",
    "detach",
    "aten.t.",
    "transpose",
    "permute",
    "alias",
    "as_strided",
    "unbind",
    "split",
    "aten.empty",
    "lift_fresh",
)
"""parts of the names of those that compute nothing"""


class CountedOperations(TorchDispatchMode):
    """While it is open: `names` of the operations that compute or copy, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if not any(view in name for view in _VIEWS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))

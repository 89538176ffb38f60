"""States of inner layers, read by hooks while an engine runs its own version of the base.

The layers are found as in `models.structure`, but for what an engine renames; a layer of an engine may give
its output in two parts, which the next one adds.

Shapes: T tokens, D width of the base.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.structure import find_mlp, names_of_parts

_REMEDY = "train a memory on keys of extract_keys --input-point final_norm"


class StateHooks:
    """Keeps the states [T, D] at some points of one layer each, of the forward that ran last."""

    def __init__(self, layers: nn.ModuleList | Sequence[nn.Module], sources: Sequence[CapturePoint]) -> None:
        """Raises ValueError where a layer has no MLP that can be found."""
        self._states: list[torch.Tensor | None] = [None] * len(sources)
        for place, source in enumerate(sources):
            layer = layers[source.layer]
            if source.point == "layer_output":
                layer.register_forward_hook(partial(self._after, place))
                continue
            mlp = find_mlp(layer)
            if mlp is None:
                raise ValueError(
                    f"no MLP is found in layer {source.layer} of the engine's base, whose parts are"
                    f" {names_of_parts(layer)}: {_REMEDY}"
                )
            mlp.register_forward_pre_hook(partial(self._before, place), with_kwargs=True)

    def take(self) -> list[torch.Tensor]:
        """The states of the forward just run, in the order of the sources.

        Raises RuntimeError where one is missing: what ran was not the layers themselves but a compiled copy.
        """
        states = [state for state in self._states if state is not None]
        if len(states) < len(self._states):
            raise RuntimeError(
                "the base's layers did not run one by one: start the engine without compilation"
            )
        self._states = [None] * len(self._states)
        return states

    def _before(self, place: int, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._states[place] = next(
            value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)
        )

    def _after(self, place: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        states = [part for part in parts if isinstance(part, torch.Tensor)]
        # Added now: the next layer's norm writes its sum into both.
        self._states[place] = states[0] if len(states) == 1 else states[0] + states[1]


def layers_of(base: nn.Module, count: int, path: str | None) -> nn.ModuleList:
    """The `count` decoder layers of an engine's base: those at `path`, or the one list of so many with MLPs.

    Raises ValueError where they are not found.
    """
    if path is not None and isinstance(found := dict(base.named_modules()).get(path), nn.ModuleList):
        return found
    lists = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(find_mlp(layer) is not None for layer in module)
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{type(base).__name__} of the engine has {len(lists)} lists of {count} layers with an MLP, and"
            f" one is needed to read states in it: {_REMEDY}"
        )
    return lists[0]

"""A memory's activations in training: computed again in the backward instead of kept, or compiled.

Part of `train`, not exported. A memory that can do so is built of `TRAINING_MLPS`; its weights have the
names of a plain one's, and what it computes is the same.

Shapes: N rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from mlpmem_ds.models.memory import MLPS, GeluMLP, Memory, NormalLinear, SwigluMLP


class _TrainingMLP:
    """The forward of an MLP class that it is mixed into, with an activation that may be recomputed."""

    recomputes = False
    before_activation: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    activation: Callable[..., torch.Tensor]
    down: NormalLinear

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        before = self.before_activation(hidden_NH)
        activated = self.activation(*before)
        if not (self.recomputes and torch.is_grad_enabled()):
            output_NH: torch.Tensor = self.down(activated)
            return output_NH
        # The same storage, which the activation's own backward keeps anyway.
        detached = [tensor.detach() for tensor in before]
        address, size = activated.data_ptr(), activated.numel()

        def pack(tensor: torch.Tensor) -> torch.Tensor | torch.Size:
            is_activated = tensor.data_ptr() == address and tensor.numel() == size
            return tensor.shape if is_activated else tensor

        def unpack(packed: torch.Tensor | torch.Size) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            with torch.no_grad():
                return self.activation(*detached).reshape(packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output_NH = self.down(activated)
        return output_NH


class _TrainingGeluMLP(_TrainingMLP, GeluMLP):
    """A `GeluMLP` for training."""


class _TrainingSwigluMLP(_TrainingMLP, SwigluMLP):
    """A `SwigluMLP` for training."""


TRAINING_MLPS: Mapping[str, Callable[..., nn.Module]] = {
    "gelu": _TrainingGeluMLP,
    "swiglu": _TrainingSwigluMLP,
}


def recompute_activations(memory: Memory, is_on: bool = True) -> None:
    """Whether training keeps only what each activation reads, and computes the activation again in the
    backward.

    The same numbers for less memory: a block of width d keeps 6 d instead of 10 d numbers a row (gelu), and
    about 2 F less of 4 F + 2 d (swiglu, F inside). Matrix products are never repeated.
    """
    for module in memory.modules():
        if isinstance(module, _TrainingMLP):
            module.recomputes = is_on


def compile_activations(memory: Memory) -> None:
    """Let torch.compile make one kernel of what stands between the matrices, forward and backward.

    Worth it for swiglu, whose product reads and writes two tensors: less time, and one of the kept tensors
    less. Numbers may differ in the last bit. Raises what `compiled_activation` raises.
    """
    activation = compiled_activation(memory.config.family, next(memory.parameters()).device)
    for module in memory.modules():
        if isinstance(module, _TrainingMLP):
            module.activation = activation


def compiled_activation(family: str, device: torch.device | str) -> Callable[..., torch.Tensor]:
    """A family's activation through torch.compile, tried on the device.

    Raises what torch.compile raises, many kinds, where it finds no compiler: it needs one of C++ on a CPU,
    Triton on CUDA.
    """
    activation = torch.compile(MLPS[family].activation)
    activation(*[torch.zeros(2, 8, device=device)] * (1 if family == "gelu" else 2))
    return activation

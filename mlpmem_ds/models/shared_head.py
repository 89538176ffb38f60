"""The base's output head, used by a memory that has none of its own: `train --head frozen`.

Such a memory was trained with the base's head, which stayed as it was. So nothing of it is stored with the
memory, and base and memory read one weight.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: `...` any leading dimensions, H hidden size, V vocabulary.
"""

import hashlib

import torch
from torch import nn
from torch.nn import functional

from .logit_transform import LogitTransform

FINGERPRINT_ROWS = 256


class SharedHead(nn.Module):
    """The output head of a base: `[..., H] -> logits [..., V]`, scaled and capped as the base's are.

    It has no parameters. What it multiplies with are the live tensors of the module that `use` was given:
    moving, converting or loading the base does the same to them.
    """

    def __init__(self, transform: LogitTransform) -> None:
        super().__init__()
        self.transform = transform
        self._lent: tuple[nn.Module, ...] = ()  # in a tuple it is no submodule: its weights stay the base's

    def use(self, head: nn.Module) -> None:
        """Let `head`, the base's linear output layer, be the one that is used."""
        self._lent = (head,)

    @property
    def module(self) -> nn.Module:
        """The base's output layer. Raises ValueError where no base has been joined."""
        if not self._lent:
            raise ValueError(
                "this memory uses the output head of its base and has none of its own: join it with the base"
                " first, with MemoryAugmentedLM.from_pretrained(base, memory)"
            )
        return self._lent[0]

    @property
    def weight(self) -> torch.Tensor:
        """[V, H]"""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[V]"""
        bias: torch.Tensor | None = getattr(self.module, "bias", None)
        return bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits in the dtype of `hidden`, on the device of the base's head."""
        weight, bias = self.weight, self.bias
        if weight.is_meta:  # of a base that is spread: its weights are on disk until its own forward runs
            logits: torch.Tensor = self.module(hidden)
            return self.transform(logits)
        if weight.dtype != hidden.dtype:
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        return self.transform(functional.linear(hidden.to(weight.device), weight, bias))


def head_fingerprint(weight: torch.Tensor) -> str:
    """Identity of an output head `[V, H]`, or of one whose first `FINGERPRINT_ROWS` rows these are: SHA-256
    of their shape and signs.

    Signs are the same in every floating dtype that the base may be loaded in.
    """
    rows = weight[:FINGERPRINT_ROWS].detach()
    signs = torch.signbit(rows).to("cpu", torch.uint8).contiguous()
    return hashlib.sha256(str(tuple(rows.shape)).encode() + signs.numpy().tobytes()).hexdigest()

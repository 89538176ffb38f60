"""What a model does to its head's output before it calls it logits: a scale, a soft cap.

Some bases do so (Cohere, Granite, Gemma), and so does a memory that starts as one of them.

This file travels with exported models as remote code: it imports torch and the standard library only.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """`softcap * tanh(scale * x / softcap)`; `softcap` None: `scale * x`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Elementwise, same shape and dtype."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None


IDENTITY = LogitTransform()

"""Which attention a base can run with here: FlashAttention needs its package, CUDA and 16 bits.

A frozen base reads full windows without padding (`StateSource.read`), so that every attention computes the
same sums; they differ in the last bits.
"""

from __future__ import annotations

import importlib.util

import torch

_FLASH = "flash_attention"
# implementation → its module and its package
_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


def reason_against(attention: str, *, device: torch.device, dtype: str) -> str | None:
    """Why this attention cannot run on the device with weights of this dtype, and what to do; None if it
    can, or only the loader knows."""
    if not attention.startswith(_FLASH):
        return None
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}: choose auto or sdpa"
    if dtype == "float32":
        return "it reads bfloat16 and float16, not float32: choose one of those dtypes, or auto or sdpa"
    module, package = _PACKAGES.get(attention, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        return (
            f"the package {package} is not installed: pip install --no-build-isolation {package}, or"
            " choose auto or sdpa"
        )
    return None


def attention_or_auto(attention: str, *, device: torch.device, dtype: str) -> tuple[str, str | None]:
    """This attention where it can run here, else `auto` and the reason."""
    reason = reason_against(attention, device=device, dtype=dtype)
    return ("auto", reason) if reason else (attention, None)

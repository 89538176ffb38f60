"""A memory whose matrices are int8, for decoding: a step at batch 1 reads every weight once, so fewer bytes
are less time.

Place in the pipeline: `MemoryAugmentedLM.quantize_memory` after loading, hence `generate --memory-weights
int8`; what is trained, evaluated by default and exported keeps its float weights.

Only weights are rounded, with one scale a row (a row is one output). On a CPU PyTorch's own product of
bfloat16 and int8 reads them as they lie; elsewhere they are widened for each product, which saves memory and
not time, unless a compiler fuses the two.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: `...` any leading dimensions, M rows, K inputs, N outputs.
"""

import torch
from torch import nn
from torch.nn import functional

_COLUMNS = 64
"""The CPU's product reads past the end of rows whose length is no multiple of 16 or 32 (PyTorch 2.13): zeros
fill them up."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights: `[..., K] -> [..., N]` in the inputs' dtype, and after it what the
    given layer does to its output (a head's `transform`).

    On a CPU inputs and products are rounded to bfloat16. Measured on a trained memory of 4 blocks of 256: KL
    of .00014 nats to the float memory's distribution (all in bfloat16: .00009), .01 % of the mixture's
    perplexity.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    ones: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.input_dtype = linear.weight.dtype
        self.transform = getattr(linear, "transform", None)
        weight_NK = linear.weight.detach().float()
        scale_N = weight_NK.abs().amax(dim=1) / 127
        scale_N = scale_N.where(scale_N > 0, 1.0)
        codes_NK = (weight_NK / scale_N[:, None]).round().to(torch.int8)
        self.missing = -codes_NK.shape[1] % _COLUMNS
        self.register_buffer("codes", functional.pad(codes_NK, (0, self.missing)))
        self.register_buffer("scale", scale_N)
        self.register_buffer("ones", torch.ones_like(scale_N, dtype=torch.bfloat16))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows_MK = functional.pad(inputs.reshape(-1, inputs.shape[-1]), (0, self.missing))
        if _has_product(rows_MK.device):
            # Its own scales would be rounded to bfloat16: ones are exact.
            product_MN = torch.ops.aten._weight_int8pack_mm(rows_MK.bfloat16(), self.codes, self.ones)
            output_MN = product_MN.float() * self.scale
        else:  # scaled first: products of whole codes would overflow float16
            weight_NK = (self.codes.float() * self.scale[:, None]).to(rows_MK.dtype)
            output_MN = functional.linear(rows_MK, weight_NK).float()
        if self.bias is not None:
            output_MN = output_MN + self.bias
        output = output_MN.to(inputs.dtype).view(*inputs.shape[:-1], output_MN.shape[-1])
        return output if self.transform is None else self.transform(output)


def _has_product(device: torch.device) -> bool:
    return device.type == "cpu" and hasattr(torch.ops.aten, "_weight_int8pack_mm")


def quantize_linears(module: nn.Module) -> None:
    """Replace every linear layer below `module` by its int8 twin, in place; the given float weights are let
    go."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linears(child)

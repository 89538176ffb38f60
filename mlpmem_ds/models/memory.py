"""The memory: a stack of residual MLP blocks that maps one hidden state of the base to a next-token
distribution.

Place in the pipeline: `train` fits it to the retriever's targets, `evaluate` and the Hugging Face export read
it. It has no attention and mixes no tokens, so it keeps no cache and its cost does not depend on the context.

Every leaf initializes itself in its own `__init__`. Under `deepspeed.zero.Init` a parameter is cut into
shards as soon as its module's `__init__` returns; an initialization done later, from outside, would write
into empty shards.

This file travels with exported models as remote code: it imports torch, the standard library and its
neighbours only.

Shapes: `...` any leading dimensions, I input size, H hidden size, F intermediate size, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from .logit_transform import LogitTransform
from .memory_config import MemoryConfig
from .shared_head import SharedHead


class NormalLinear(nn.Linear):
    """A linear layer whose weight starts normal with the given standard deviation, and its bias at 0."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, standard_deviation: float) -> None:
        # Set first: nn.Linear's own __init__ ends with the call of reset_parameters.
        self.standard_deviation = standard_deviation
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, mean=0.0, std=self.standard_deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MemoryHead(NormalLinear):
    """The memory's own output head: `[..., H] -> logits [..., V]`, scaled and capped where the base's are."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        initializer_range: float,
        bias: bool,
        transform: LogitTransform,
    ) -> None:
        super().__init__(hidden_size, vocab_size, bias=bias, standard_deviation=initializer_range)
        self.transform = transform

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.transform(super().forward(hidden))


class HeadFactory(Protocol):
    """What `Memory` calls to make its head. The head must own a parameter `weight` of shape [V, H], and with
    `bias` a parameter `bias` [V]; what it gives or trains is `transform(hidden @ weight.T + bias)`."""

    def __call__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        initializer_range: float,
        bias: bool,
        transform: LogitTransform,
    ) -> nn.Module: ...


class OnePlusLayerNorm(nn.Module):
    """LayerNorm over `[..., H]` whose factor is `1 + weight`, computed in float32: Nemotron's."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        factor, bias = 1.0 + self.weight.float(), self.bias.float()
        normed = functional.layer_norm(hidden.float(), factor.shape, factor, bias, self.epsilon)
        return normed.to(hidden.dtype)


class OnePlusRMSNorm(nn.Module):
    """RMSNorm over `[..., H]` whose factor is `1 + weight`, computed in float32: Gemma's."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        factor = 1.0 + self.weight.float()
        return functional.rms_norm(hidden.float(), factor.shape, factor, self.epsilon).to(hidden.dtype)


def make_norm(kind: str, hidden_size: int, epsilon: float) -> nn.Module:
    """A norm of one of `memory_config.NORMS`; it leaves its own `__init__` with factor 1 and bias 0."""
    if kind == "layer-one-plus":
        return OnePlusLayerNorm(hidden_size, epsilon)
    if kind == "rms-one-plus":
        return OnePlusRMSNorm(hidden_size, epsilon)
    is_affine = not kind.endswith("-plain")
    if kind.startswith("rms"):
        return nn.RMSNorm(hidden_size, eps=epsilon, elementwise_affine=is_affine)
    return nn.LayerNorm(hidden_size, eps=epsilon, elementwise_affine=is_affine, bias=kind != "layer-no-bias")


class GeluMLP(nn.Module):
    """`down(gelu(up(x)))` with biases, tanh approximation: the MLP of GPT-2."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        std = config.initializer_range
        self.up = NormalLinear(
            config.hidden_size, config.intermediate_size, bias=True, standard_deviation=std
        )
        self.down = NormalLinear(
            config.intermediate_size, config.hidden_size, bias=True, standard_deviation=_residual_std(config)
        )

    @staticmethod
    def activation(up: torch.Tensor) -> torch.Tensor:
        return functional.gelu(up, approximate="tanh")

    def before_activation(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.up(hidden),)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(self.activation(*self.before_activation(hidden)))
        return output


class SwigluMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` without biases: the MLP of Llama."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        std = config.initializer_range
        self.gate = NormalLinear(
            config.hidden_size, config.intermediate_size, bias=False, standard_deviation=std
        )
        self.up = NormalLinear(
            config.hidden_size, config.intermediate_size, bias=False, standard_deviation=std
        )
        self.down = NormalLinear(
            config.intermediate_size, config.hidden_size, bias=False, standard_deviation=_residual_std(config)
        )

    @staticmethod
    def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate) * up

    def before_activation(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.gate(hidden), self.up(hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(self.activation(*self.before_activation(hidden)))
        return output


MLPS: Mapping[str, type[GeluMLP] | type[SwigluMLP]] = {"gelu": GeluMLP, "swiglu": SwigluMLP}


class MemoryBlock(nn.Module):
    """`x + MLP(norm(x))` on `[..., H]`."""

    def __init__(self, config: MemoryConfig, mlps: Mapping[str, Callable[[MemoryConfig], nn.Module]]) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.mlp = mlps[config.family](config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = hidden + self.mlp(self.norm(hidden))
        return output


class Memory(nn.Module):
    """The memory. `forward` gives the hidden state after the final norm, if it has one; `head` turns it into
    logits (or into a loss).

    The input projection exists only when input and hidden sizes differ; it maps all of an input, or, with
    `residual_input`, all but its last H numbers, to which it adds. `head_class` is a `HeadFactory`, so
    that training can use a head that owns its loss, and of `mlps` the one of the family is called as
    `mlp(config)`. Without a `head_class` the head is a plain one, or that of the base where the config says
    so; then `share_head` must be called before the head is.
    """

    def __init__(
        self,
        config: MemoryConfig,
        head_class: HeadFactory | None = None,
        mlps: Mapping[str, Callable[[MemoryConfig], nn.Module]] = MLPS,
    ) -> None:
        super().__init__()
        self.config = config
        self.input_projection: NormalLinear | None = None
        if config.num_projected:
            self.input_projection = NormalLinear(
                config.num_projected,
                config.hidden_size,
                bias=not config.residual_input,
                standard_deviation=0.0 if config.residual_input else config.initializer_range,
            )
        self.blocks = nn.ModuleList(MemoryBlock(config, mlps) for _ in range(config.num_blocks))
        self.final_norm = _norm(config) if config.final_norm else nn.Identity()
        transform = LogitTransform(scale=config.logit_scale, softcap=config.logit_softcap)
        self.head: nn.Module
        if head_class is None and config.shared_head is not None:
            self.head = SharedHead(transform)
            return
        self.head = (head_class or MemoryHead)(
            config.hidden_size,
            config.vocab_size,
            initializer_range=config.initializer_range,
            bias=config.head_bias,
            transform=transform,
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs [..., I]` in the weights' dtype -> hidden `[..., H]`, after the final norm, before the
        head."""
        hidden = self._residual_stream(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        output: torch.Tensor = self.final_norm(hidden)
        return output

    def _residual_stream(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the first block reads: `[..., I] -> [..., H]`."""
        if self.input_projection is None:
            return inputs
        if not self.config.residual_input:
            projected: torch.Tensor = self.input_projection(inputs)
            return projected
        width = self.config.hidden_size
        others, own = inputs.split([self.config.num_projected, width], dim=-1)
        # The residual streams of layers differ in scale, and some of their numbers are massive: a step of the
        # optimizer on the matrix would throw the base's own state over.
        size = width if others.shape[-1] % width == 0 else others.shape[-1]
        parts = functional.rms_norm(others.unflatten(-1, (-1, size)), (size,), eps=self.config.norm_epsilon)
        stream: torch.Tensor = own + self.input_projection(parts.flatten(-2))
        return stream

    def cast(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inputs on the weights' device and in their dtype."""
        # A head that is the base's may lie elsewhere.
        first: Any = self.blocks[0]
        own: Any = first.mlp.up if isinstance(self.head, SharedHead) else self.head
        if hasattr(own, "input_dtype"):  # int8
            return inputs.to(device=own.codes.device, dtype=own.input_dtype)
        return inputs.to(device=own.weight.device, dtype=own.weight.dtype)

    def share_head(self, head: nn.Module) -> None:
        """Use this output layer, of the base, where the memory has none of its own; else nothing is done."""
        if isinstance(self.head, SharedHead):
            self.head.use(head)


def _residual_std(config: MemoryConfig) -> float:
    # GPT-2's rule: the sum over the depth keeps the scale of one block's output.
    return config.initializer_range / math.sqrt(2 * config.num_blocks)


def _norm(config: MemoryConfig) -> nn.Module:
    return make_norm(config.kind_of_norm, config.hidden_size, config.norm_epsilon)

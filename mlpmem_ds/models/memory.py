"""The memory: a stack of residual MLP blocks that maps one hidden state of the base to a next-token
distribution.

Place in the pipeline: `train` fits it to the retriever's targets, `evaluate` and the Hugging Face export read
it. It has no attention and mixes no tokens, so it keeps no cache and its cost does not depend on the context.

Every leaf initializes itself in its own `__init__`. Under `deepspeed.zero.Init` a parameter is cut into
shards as soon as its module's `__init__` returns; an initialization done later, from outside, would write
into empty shards.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: `...` any leading dimensions, I input size, H hidden size, F intermediate size, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

FAMILIES = ("gelu", "swiglu")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The shape of a memory: plain values only.

    `family` is `gelu` (LayerNorm, two matrices with biases, tanh GELU: GPT-2's MLP) or `swiglu` (RMSNorm,
    three matrices without bias: Llama's MLP). `initializer_range` is the standard deviation of every fresh
    weight, before the 1/sqrt(2 * num_blocks) of the matrices that write to the residual stream.
    """

    input_size: int
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    vocab_size: int
    family: str = "gelu"
    norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "intermediate_size", "num_blocks", "vocab_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"a memory's {name} must be a whole number of at least 1, not {value!r}")
        for name in ("norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"a memory's {name} must be a positive number, not {value!r}")
        if self.family not in FAMILIES:
            raise ValueError(f"a memory's family must be one of {', '.join(FAMILIES)}, not {self.family!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MemoryConfig":
        """The config of these values. Raises ValueError for unknown or missing keys and for values out of
        range."""
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(
                f"unknown keys in a memory config: {', '.join(unknown)} (known: {', '.join(names)})"
            )
        required = ("input_size", "hidden_size", "intermediate_size", "num_blocks", "vocab_size")
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"missing keys in a memory config: {', '.join(missing)}")
        return cls(**values)

    def num_parameters(self) -> int:
        """Number of parameters of `Memory(self)`, its head included, by formula: nothing is built."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        if self.family == "gelu":
            norm = 2 * hidden
            mlp = 2 * hidden * intermediate + intermediate + hidden
        else:
            norm = hidden
            mlp = 3 * hidden * intermediate
        projection = 0 if self.input_size == hidden else (self.input_size + 1) * hidden
        return projection + self.num_blocks * (norm + mlp) + norm + self.vocab_size * hidden

    def num_matrix_parameters(self) -> int:
        """Numbers in the matrices that each row is multiplied with: 2 FLOPs each forward, 4 backward."""
        matrices = 2 if self.family == "gelu" else 3
        projection = 0 if self.input_size == self.hidden_size else self.input_size * self.hidden_size
        return (
            projection
            + self.num_blocks * matrices * self.hidden_size * self.intermediate_size
            + self.vocab_size * self.hidden_size
        )


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
    """The memory's own output head: `[..., H] -> logits [..., V]`, no bias."""

    def __init__(self, hidden_size: int, vocab_size: int, *, initializer_range: float) -> None:
        super().__init__(hidden_size, vocab_size, bias=False, standard_deviation=initializer_range)


class HeadFactory(Protocol):
    """What `Memory` calls to make its head. The head must own a parameter `weight` of shape [V, H]."""

    def __call__(self, hidden_size: int, vocab_size: int, *, initializer_range: float) -> nn.Module: ...


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
    """The memory. `forward` gives the hidden state after the final norm; `head` turns it into logits (or into
    a loss).

    The input projection exists only when input and hidden sizes differ. `head_class` is called as
    `head_class(hidden_size, vocab_size, initializer_range=...)`, so that training can use a head that owns
    its loss, and of `mlps` the one of the family as `mlp(config)`.
    """

    def __init__(
        self,
        config: MemoryConfig,
        head_class: HeadFactory = MemoryHead,
        mlps: Mapping[str, Callable[[MemoryConfig], nn.Module]] = MLPS,
    ) -> None:
        super().__init__()
        self.config = config
        self.input_projection: NormalLinear | None = None
        if config.input_size != config.hidden_size:
            self.input_projection = NormalLinear(
                config.input_size, config.hidden_size, bias=True, standard_deviation=config.initializer_range
            )
        self.blocks = nn.ModuleList(MemoryBlock(config, mlps) for _ in range(config.num_blocks))
        self.final_norm = _norm(config)
        self.head = head_class(
            config.hidden_size, config.vocab_size, initializer_range=config.initializer_range
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs [..., I]` in the weights' dtype -> hidden `[..., H]`, after the final norm, before the
        head."""
        hidden = inputs if self.input_projection is None else self.input_projection(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        output: torch.Tensor = self.final_norm(hidden)
        return output


def _residual_std(config: MemoryConfig) -> float:
    # GPT-2's rule: the sum over the depth keeps the scale of one block's output.
    return config.initializer_range / math.sqrt(2 * config.num_blocks)


def _norm(config: MemoryConfig) -> nn.Module:
    # Both leave their own __init__ with weight 1 (and bias 0).
    if config.family == "gelu":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
    return nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)


def _preset(
    family: str, num_blocks: int, hidden_size: int, intermediate_size: int
) -> Callable[[int], MemoryConfig]:
    def config(vocab_size: int) -> MemoryConfig:
        return MemoryConfig(
            input_size=hidden_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_blocks=num_blocks,
            vocab_size=vocab_size,
            family=family,
        )

    return config


# Name -> function of the vocabulary's size. The first five are the paper's (arXiv 2508.01832, appendix and
# code); the scale presets carry their name's number of parameters to within 5 % at a vocabulary of 32,000.
# The input size is the hidden size; for a base of another width use dataclasses.replace(config,
# input_size=...).
PRESETS: dict[str, Callable[[int], MemoryConfig]] = {
    "gelu-18x768": _preset("gelu", 18, 768, 4 * 768),
    "gelu-36x1024": _preset("gelu", 36, 1024, 4 * 1024),
    "gelu-54x1280": _preset("gelu", 54, 1280, 4 * 1280),
    "swiglu-8x4096-11008": _preset("swiglu", 8, 4096, 11008),
    "swiglu-8x4096-14336": _preset("swiglu", 8, 4096, 14336),
    "1b": _preset("swiglu", 19, 2048, 8192),
    "3b": _preset("swiglu", 26, 3072, 12288),
    "7b": _preset("swiglu", 39, 4096, 14336),
    "13b": _preset("swiglu", 47, 5120, 17920),
}

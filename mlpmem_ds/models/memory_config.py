"""A memory in plain values: its shape, named sizes, and its weight in the mixture where none was chosen.

This file travels with exported models as remote code: it imports the standard library only.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

DEFAULT_LAMBDA = 0.25
"""λ where nothing was tuned: the weight of the memory that the paper's language-modelling results use"""

FAMILIES = ("gelu", "swiglu")

NORMS: Mapping[str, int] = {
    "layer": 2,
    "layer-one-plus": 2,
    "layer-no-bias": 1,
    "layer-plain": 0,
    "rms": 1,
    "rms-one-plus": 1,
    "rms-plain": 0,
}
"""kind of norm → its vectors: LayerNorm or RMSNorm, with weight w and bias, with 1 + w in place of w (Gemma,
Nemotron), without a bias (Cohere), with nothing that is learnt (OLMo)"""

_LEFT_OUT = (
    *("norm", "final_norm", "head_bias", "residual_input", "window", "logit_scale", "logit_softcap"),
    "shared_head",
)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The shape of a memory: plain values only.

    `family` is `gelu` (LayerNorm, two matrices with biases, tanh GELU: GPT-2's MLP) or `swiglu` (RMSNorm,
    three matrices without bias: Llama's MLP). `initializer_range` is the standard deviation of every fresh
    weight, before the 1/sqrt(2 * num_blocks) of the matrices that write to the residual stream.

    The other fields let a memory start as its base: `norm` is one of `NORMS` (None: as the family has it),
    `final_norm` says whether one stands before the head, which may have a bias, and whose logits are
    `logit_softcap * tanh(logit_scale * x / logit_softcap)` (no soft cap: None). With `residual_input` the
    last `hidden_size` numbers of an input are the residual stream, and a matrix, at zero to begin with, adds
    to it what it makes of the others (the states of earlier layers and positions), each divided by its root
    mean square. With a `window` an input has the states of so many positions, the position's own as the last.
    """

    input_size: int
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    vocab_size: int
    family: str = "gelu"
    norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    norm: str | None = None
    final_norm: bool = True
    head_bias: bool = False
    residual_input: bool = False
    window: int = 1
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    shared_head: str | None = None

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "intermediate_size", "num_blocks", "vocab_size", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"a memory's {name} must be a whole number of at least 1, not {value!r}")
        for name in ("norm_epsilon", "initializer_range", "logit_scale", "logit_softcap"):
            value = getattr(self, name)
            if name == "logit_softcap" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"a memory's {name} must be a positive number, not {value!r}")
        if self.family not in FAMILIES:
            raise ValueError(f"a memory's family must be one of {', '.join(FAMILIES)}, not {self.family!r}")
        if self.residual_input and self.input_size < self.hidden_size:
            raise ValueError(
                "a memory with residual_input needs inputs of at least its hidden_size"
                f" {self.hidden_size}, not {self.input_size}"
            )
        if self.norm is not None and self.norm not in NORMS:
            raise ValueError(f"a memory's norm must be one of {', '.join(NORMS)}, not {self.norm!r}")
        for name in ("final_norm", "head_bias", "residual_input"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"a memory's {name} must be true or false, not {getattr(self, name)!r}")
        if self.shared_head is not None and (not isinstance(self.shared_head, str) or not self.shared_head):
            raise ValueError(
                f"a memory's shared_head must be null or the identity of a head, not {self.shared_head!r}"
            )

    @property
    def num_projected(self) -> int:
        """Numbers of an input that a matrix brings to the width; 0: there is no such matrix."""
        if self.residual_input:
            return self.input_size - self.hidden_size
        return 0 if self.input_size == self.hidden_size else self.input_size

    @property
    def kind_of_norm(self) -> str:
        """One of `NORMS`."""
        return self.norm or ("layer" if self.family == "gelu" else "rms")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse. What only some memories have is left out
        where it has its default."""
        values = asdict(self)
        for field in fields(self):
            if field.name in _LEFT_OUT and values[field.name] == field.default:
                del values[field.name]
        return values

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
        """Number of parameters of `Memory(self)`, an own head included, by formula: nothing is built."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        norm = NORMS[self.kind_of_norm] * hidden
        if self.family == "gelu":
            mlp = 2 * hidden * intermediate + intermediate + hidden
        else:
            mlp = 3 * hidden * intermediate
        has_bias = self.num_projected > 0 and not self.residual_input
        projection = (self.num_projected + has_bias) * hidden
        head = 0 if self.shared_head is not None else self._head_parameters()
        return projection + self.num_blocks * (norm + mlp) + self.final_norm * norm + head

    def num_shared_parameters(self) -> int:
        """Number of parameters of the base that the memory uses: of its output head, or none."""
        return 0 if self.shared_head is None else self._head_parameters()

    def _head_parameters(self) -> int:
        return self.vocab_size * (self.hidden_size + self.head_bias)

    def training_flops(self) -> int:
        """Of the matrix products of one row, forward and backward."""
        without_gradient = 0 if self.shared_head is None else self.vocab_size * self.hidden_size
        return 6 * self.num_matrix_parameters() - 2 * without_gradient

    def num_matrix_parameters(self) -> int:
        """Numbers in the matrices that each row is multiplied with, those of a shared head among them: 2
        FLOPs each forward, 2 for each of the two gradients."""
        matrices = 2 if self.family == "gelu" else 3
        return (
            self.num_projected * self.hidden_size
            + self.num_blocks * matrices * self.hidden_size * self.intermediate_size
            + self.vocab_size * self.hidden_size
        )


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

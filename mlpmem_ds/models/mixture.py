"""The mixture of base and memory, and the gates that say how much of each: the only home of both.

`p(y|x) = (1 - λ) p_base(y|x) + λ p_mem(y|x)`, where a *gate* gives λ, the memory's weight, at each position.
`hf` mixes logits with it, evaluation and validation mix the log-probabilities that two models gave to the
token that followed. Twins that must follow a change here: `maths/kernels/probability_rows.py` (Triton), and
the training loss through the mixture with its derivative (`maths/sparse_chunk.py`, a test ties it to this).

Several memories of one base are a *bank*: `p = (1 - Σλ_m) p_base + Σ λ_m p_m`, with a weight for each memory.
Gates that learned λ, and the register of all that a model can hold, are in `gates`.

This file travels with exported models as remote code: it imports torch and the standard library only.

Shapes: `...` any leading dimensions, V vocabulary, D width of the base, N positions, G weights of a grid, M
memories of a bank, H numbers of a history.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch

from .memory_config import DEFAULT_LAMBDA

if TYPE_CHECKING:
    from .capture_point import CapturePoint
    from .gate_features import History

_NO_STATES: Mapping[str, Any] = MappingProxyType({})
_MAX_STEPS = 1000  # of a range of λ
_ROUNDING = 1e-6  # a sum of weights so near to 1 is 1: gates give them in float32


def checked_lmbda(value: float) -> float:
    """`value` as a float. Raises ValueError unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"λ (lmbda) is the memory's share of the mixture: a number in [0, 1], not {value!r}")
    return float(value)


def share_of_all(lmbdas: Iterable[float]) -> float:
    """λ of several memories together: the sum of their weights, of which rounding may have made more than
    1."""
    return min(sum(lmbdas), 1.0)


def log_mixture(base: torch.Tensor, memory: torch.Tensor, lmbda: float | torch.Tensor) -> torch.Tensor:
    """`log((1 - λ) e^base + λ e^memory)`, elementwise, from two tensors of log-probabilities.

    Exact where λ is 0 (base, bit for bit) or 1 (memory), and where either side is -inf.

    Args:
        base, memory: of one shape, or of shapes that broadcast.
        lmbda: a number; or a tensor, with a value for each row of the inputs (one dimension fewer: it holds
            along the last) or of any shape that broadcasts with theirs.

    Returns:
        float32, or float64 if either input is. Of a number λ = 0 or 1 the other side is not read. The
        gradient of a tensor λ is 0 where it is exactly 0 or 1.

    Raises:
        ValueError: λ is a number outside [0, 1] (a tensor's values outside give NaN: it may lie on a
            device), or has a shape that does not fit.
    """
    dtype = torch.promote_types(torch.promote_types(base.dtype, memory.dtype), torch.float32)
    base, memory = base.to(dtype), memory.to(dtype)
    if isinstance(lmbda, torch.Tensor):
        keep, take = _log_weights(_along_rows(lmbda, base))
        return torch.logaddexp(base + keep.to(dtype), memory + take.to(dtype))
    weight = checked_lmbda(lmbda)
    if weight in (0.0, 1.0):
        return memory if weight else base
    return torch.logaddexp(base + math.log1p(-weight), memory + math.log(weight))


def log_mixture_of_logits(
    base_logits: torch.Tensor, memory_logits: torch.Tensor, lmbda: float | torch.Tensor
) -> torch.Tensor:
    """`log((1 - λ) softmax(base) + λ softmax(memory))` over the last dimension, float32 `[..., V]`.

    The logits are `[..., V]` in any floating dtype, λ a number or a value a row `[...]`. Raises ValueError as
    `log_mixture`, and where the shapes differ.
    """
    check_rows(base_logits, memory_logits, lmbda)
    if not isinstance(lmbda, torch.Tensor):
        weight = checked_lmbda(lmbda)
        if weight in (0.0, 1.0):
            return torch.log_softmax((memory_logits if weight else base_logits).float(), dim=-1)
    base, memory = (torch.log_softmax(logits.float(), dim=-1) for logits in (base_logits, memory_logits))
    return log_mixture(base, memory, lmbda)


def log_mixture_of_bank(
    base: torch.Tensor, memories: Sequence[torch.Tensor], lmbdas: torch.Tensor
) -> torch.Tensor:
    """`log((1 - Σλ_m) e^base + Σ λ_m e^memory_m)`, elementwise, from log-probabilities of M memories.

    Exact where one weight is 1 or all are 0, and where a side is -inf. Of one memory it is `log_mixture`.

    Args:
        base, memories: of one shape.
        lmbdas: `[..., M]`: the leading dimensions are none, those of the inputs but the last (a set of
            weights for each row), or theirs.

    Returns:
        float32, or float64 if an input is. No side is NaN unless a weight lies outside [0, 1] or their sum
        does, by more than rounding.

    Raises:
        ValueError: there is not a weight for each memory, or the weights have a shape that does not fit.
    """
    if not memories or lmbdas.shape[-1] != len(memories):
        raise ValueError(f"{len(memories)} memories need as many weights, not {lmbdas.shape[-1:]}")
    dtype = torch.promote_types(base.dtype, torch.float32)
    for memory in memories:
        dtype = torch.promote_types(dtype, memory.dtype)
    weights = lmbdas.to(base.device).double()
    rest = 1 - weights.sum(-1)
    rest = torch.where(rest.abs() < _ROUNDING, rest * 0, rest)
    mixed = base.to(dtype) + _log_weight(_along_rows(rest, base)).to(dtype)
    for memory, weight in zip(memories, weights.unbind(-1), strict=True):
        taken = _log_weight(_along_rows(weight, base)).to(dtype)
        mixed = torch.logaddexp(mixed, memory.to(dtype) + taken)
    return mixed


def log_mixture_of_bank_logits(
    base_logits: torch.Tensor, memory_logits: Sequence[torch.Tensor], lmbdas: torch.Tensor
) -> torch.Tensor:
    """`log_mixture_of_bank` of softmaxes over the last dimension, float32 [..., V].

    The logits are [..., V] in any floating dtype, `lmbdas` [M] or [..., M]. Raises ValueError as that does.
    """
    base, *memories = (torch.log_softmax(logits.float(), dim=-1) for logits in (base_logits, *memory_logits))
    return log_mixture_of_bank(base, memories, lmbdas)


def check_rows(base_logits: torch.Tensor, memory_logits: torch.Tensor, lmbda: float | torch.Tensor) -> None:
    """Raises ValueError unless both logits have one shape, and a tensor λ a value for each of their rows."""
    if base_logits.shape != memory_logits.shape:
        raise ValueError(
            f"logits of the base are {list(base_logits.shape)}, of the memory {list(memory_logits.shape)};"
            " they must agree"
        )
    if isinstance(lmbda, torch.Tensor) and lmbda.shape != base_logits.shape[:-1]:
        raise ValueError(
            f"λ is {list(lmbda.shape)}; it is a number, or one for each of the rows"
            f" {list(base_logits.shape[:-1])}"
        )


def _along_rows(lmbda: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """λ in a shape that broadcasts with the values: one a row holds along the last dimension."""
    if lmbda.ndim == 0 or lmbda.ndim >= values.ndim:
        return lmbda
    if lmbda.shape != values.shape[:-1]:
        raise ValueError(
            f"λ is {list(lmbda.shape)}; it is a number, one for each of the rows {list(values.shape[:-1])},"
            f" or of a shape that broadcasts with {list(values.shape)}"
        )
    return lmbda[..., None]


def _log_weights(lmbda: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log(1 - λ) and log λ, float64; at λ = 0 and 1 exactly 0 and -inf, with no gradient there: that of a
    logarithm at 0, infinite, would meet a factor of 0 and make the sum not a number."""
    lmbda = lmbda.double()
    is_zero, is_one = lmbda == 0, lmbda == 1
    inside = torch.where(is_zero | is_one, 0.5, lmbda)
    keep = torch.where(is_zero, 0.0, torch.where(is_one, -math.inf, torch.log1p(-inside)))
    take = torch.where(is_one, 0.0, torch.where(is_zero, -math.inf, torch.log(inside)))
    return keep, take


def _log_weight(weight: torch.Tensor) -> torch.Tensor:
    """log of a weight, float64; -inf and without a gradient where it is exactly 0."""
    is_zero = weight == 0
    return torch.where(is_zero, -math.inf, torch.log(torch.where(is_zero, 0.5, weight)))


# Gates


@dataclass(frozen=True, kw_only=True)
class GateInputs:
    """What a gate may read at each position, before the token that follows is known.

    A field more is how a new kind of evidence comes in; a host that cannot give one leaves it out, and the
    gate that needs it says so.
    """

    base_logits: torch.Tensor | None = None  # [..., V]
    memory_logits: Sequence[torch.Tensor] = ()  # [..., V] of each memory
    memory_states: Sequence[torch.Tensor] = ()  # of each memory, what its head reads
    states: Mapping[str, torch.Tensor] = field(default_factory=dict)  # [..., D], by the names of `Gate.reads`
    history: torch.Tensor | None = None  # [..., H], as `Gate.history` keeps it
    confidences: torch.Tensor | None = None  # of `gate_features`, from a host that has made them already


NOTHING = GateInputs()


@runtime_checkable
class Gate(Protocol):
    """Gives λ, the memory's weight in [0, 1], at each position; of a bank, one for each memory.

    Why this signature. A gate is a function of what is known at a position and no more: whoever runs the
    models (the joint model at each forward, evaluation over a corpus) computes the evidence and applies the
    λ, so that neither knows what kind of gate it holds. All evidence comes in one record, of which a gate
    reads what it needs: entropies and greatest probabilities are a line each from the logits that the host
    has anyway, hidden states are captured only where `reads` names them, and past tokens are followed only
    where `history` says how. A record, not arguments: new evidence adds a field and touches no
    other gate. How a gate was fitted is not part of the protocol, since
    only its own training knows; a fitted one may be a `torch.nn.Module`, whose weights are then saved with
    the joint model that holds it.
    """

    @property
    def reads(self) -> "Mapping[str, CapturePoint]":
        """Hidden states of the base that it needs in `GateInputs.states`, by name."""
        ...

    @property
    def history(self) -> "History | None":
        """What it needs in `GateInputs.history`, and how the host keeps it; None: nothing."""
        ...

    def __call__(self, inputs: GateInputs = NOTHING, /) -> float | torch.Tensor:
        """λ: one number for all positions, or `[...]`, a value for each; of a bank `[M]` or `[..., M]`."""
        ...


@runtime_checkable
class StoredGate(Gate, Protocol):
    """A gate that a joint model holds and an export stores."""

    def settings(self) -> dict[str, Any]:
        """Plain values for config.json: `kind`, a name in `gates.GATES`, and all that its entry there needs
        but the model's `lmbda`."""
        ...

    def __str__(self) -> str:
        """In a few words, for the head of a column."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same λ at every position."""

    lmbda: float = DEFAULT_LAMBDA
    reads: ClassVar[Mapping[str, Any]] = _NO_STATES
    history: ClassVar[None] = None

    def __post_init__(self) -> None:
        checked_lmbda(self.lmbda)

    def __call__(self, _: GateInputs = NOTHING, /) -> float:
        return float(self.lmbda)

    def settings(self) -> dict[str, Any]:
        return {"kind": "constant"}

    def __str__(self) -> str:
        return f"λ = {self.lmbda:g}"


@dataclass(frozen=True)
class Weights:
    """The same weights at every position, one for each memory of a bank."""

    lmbdas: tuple[float, ...]
    reads: ClassVar[Mapping[str, Any]] = _NO_STATES
    history: ClassVar[None] = None

    def __post_init__(self) -> None:
        total = sum(checked_lmbda(value) for value in self.lmbdas)
        if not self.lmbdas or total > 1 + _ROUNDING:
            raise ValueError(
                f"the weights {self.lmbdas} of a bank: one for each memory, with a sum of at most 1"
            )

    def __call__(self, _: GateInputs = NOTHING, /) -> torch.Tensor:
        """float64 [M]."""
        return torch.tensor(self.lmbdas, dtype=torch.float64)

    def settings(self) -> dict[str, Any]:
        return {"kind": "weights", "lmbdas": list(self.lmbdas)}

    def __str__(self) -> str:
        return "λ = " + ", ".join(f"{value:g}" for value in self.lmbdas)


@dataclass(frozen=True)
class Grid:
    """Several constants to choose from, in evaluation and validation.

    As a gate it gives `[G, 1]` float64: with log-probabilities `[N]` the mixture is `[G, N]`. Iterated, it
    gives the constants one by one, where that would be too large.
    """

    lambdas: tuple[float, ...]
    reads: ClassVar[Mapping[str, Any]] = _NO_STATES
    history: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not self.lambdas:
            raise ValueError("a grid needs at least one λ, such as 0:1:0.05")
        for value in self.lambdas:
            checked_lmbda(value)

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Grid":
        """From the words of a flag: each is a number, or `first:last:step`, such as `0:1:0.05` for 0, 0.05,
        …, 1.

        Values that come twice are taken once. Raises ValueError for what is neither, for what is outside
        [0, 1], for a range of more than a thousand steps, and for values that are alike in the six digits by
        which they are named.
        """
        values = tuple(dict.fromkeys(value for word in words for value in _values_of(word)))
        named: dict[str, float] = {}
        for value in values:
            if (former := named.setdefault(f"{value:g}", value)) != value:
                raise ValueError(f"{former!r} and {value!r} are alike in six digits: give one of them")
        return cls(values)

    def __iter__(self) -> Iterator[Constant]:
        return map(Constant, self.lambdas)

    def __call__(self, _: GateInputs = NOTHING, /) -> torch.Tensor:
        return torch.tensor(self.lambdas, dtype=torch.float64)[:, None]


def _values_of(word: str) -> list[float]:
    try:
        numbers = [float(part) for part in word.split(":")]
        if len(numbers) not in (1, 3) or (len(numbers) == 3 and not 0 < numbers[2] < math.inf):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{word} is neither a number nor first:last:step with a step above 0, such as 0:1:0.05"
        ) from None
    first, last, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], 1.0)
    if not 0 <= first <= last <= 1:
        raise ValueError(f"{word}: the memory's share of the mixture lies between 0 and 1")
    num_steps = (last - first) / step + 1e-9
    if num_steps >= _MAX_STEPS + 1:
        raise ValueError(f"{word} has more than {_MAX_STEPS:,} steps, each of which is scored: give fewer")
    return [round(first + step * number, 12) for number in range(int(num_steps) + 1)]

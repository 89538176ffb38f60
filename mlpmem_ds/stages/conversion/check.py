"""Part of `convert_checkpoint`: the written model, loaded again, gives what base and memory give on a probe.

Weights whose dtype does not change, and those of the written files, are memory-mapped and not copied: a model
larger than the machine's memory can be checked, slowly.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.formats.weight_shards import Weight
from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.mixture import Constant, GateInputs, StoredGate, log_mixture, log_mixture_of_bank
from mlpmem_ds.models.past_states import with_past

# The loaded model and its parts do the same operations on the same numbers: what is left is float32 against
# float64 in the softmax and the mixture. Largest difference of log-probabilities over the largest
# log-probability; for every dtype.
LOGIT_BOUND = 1e-6
# A learned gate sums its history in float32, in another order than the check, and its slopes pass that on.
GATE_BOUND = 1e-4
_PROBE_SHAPE = (4, 32)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the parts give on the probe batch: float64 log-probabilities [B, S, V] of the base and of each
    memory, and all that a gate may read."""

    ids_BS: torch.Tensor
    base_BSV: torch.Tensor
    memories_BSV: tuple[torch.Tensor, ...]
    evidence: GateInputs

    def mixture_BSV(self, gate: StoredGate) -> torch.Tensor:
        lmbdas = gate(self.evidence)
        if len(self.memories_BSV) == 1:
            return log_mixture(self.base_BSV, self.memories_BSV[0], lmbdas)
        if not isinstance(lmbdas, torch.Tensor):  # shared equally
            lmbdas = torch.full((len(self.memories_BSV),), lmbdas / len(self.memories_BSV))
        return log_mixture_of_bank(self.base_BSV, self.memories_BSV, lmbdas)


@torch.no_grad()
def read_parts(
    base: Any,
    memories: Sequence[Memory],
    points: Mapping[str, CapturePoint],
    gate: StoredGate,
    *,
    layers_path: str | None = None,
) -> Probe:
    """Run the parts on random tokens without the joint model: the base, and each memory on its own state.

    Args:
        points: of each memory in turn.
        gate: its states and its history are read, too.
    """
    text = base.config.get_text_config(decoder=True)
    num_sequences, num_tokens = _PROBE_SHAPE
    num_tokens = min(num_tokens, getattr(text, "max_position_embeddings", None) or num_tokens)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(text.vocab_size, (num_sequences, num_tokens), generator=generator)
    places = [*points.values(), *gate.reads.values()]
    with capture(base, list(dict.fromkeys(places)), layers_path=layers_path).recording(
        num_sequences, num_tokens
    ) as states:
        base_logits_BSV = base(input_ids=ids_BS, use_cache=False).logits
    hidden = [
        memory(memory.cast(_with_window(states[point], memory.config.window)))
        for memory, point in zip(memories, points.values(), strict=True)
    ]
    logits = tuple(memory.head(each) for memory, each in zip(memories, hidden, strict=True))
    base_BSV, *memories_BSV = (each.double().log_softmax(-1) for each in (base_logits_BSV, *logits))
    return Probe(
        ids_BS=ids_BS,
        base_BSV=base_BSV,
        memories_BSV=tuple(memories_BSV),
        evidence=GateInputs(
            base_logits=base_logits_BSV,
            memory_logits=logits,
            memory_states=tuple(hidden),
            states={name: states[point] for name, point in gate.reads.items()},
            history=_history(gate, ids_BS, base_BSV, memories_BSV),
        ),
    )


def _with_window(states_BSD: torch.Tensor, window: int) -> torch.Tensor:
    """What a memory with this window reads at each position of texts without padding."""
    return torch.stack([with_past(states_SD, window - 1) for states_SD in states_BSD])


def _history(
    gate: StoredGate, ids_BS: torch.Tensor, base_BSV: torch.Tensor, memories_BSV: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """What the gate remembers at each position, [B, S, H], token by token."""
    if gate.history is None:
        return None
    state_BH = gate.history.start(len(ids_BS))
    states = [state_BH]
    for at in range(1, ids_BS.shape[1]):
        next_B1 = ids_BS[:, at : at + 1]
        base_B, *memories_B = (
            log_BSV[:, at - 1].gather(-1, next_B1)[:, 0] for log_BSV in (base_BSV, *memories_BSV)
        )
        state_BH = gate.history.update(state_BH, base_B, torch.stack(memories_B, dim=-1))
        states.append(state_BH)
    return torch.stack(states, dim=1)


def total_variation(one: Probe, other: Probe, gate: StoredGate) -> float:
    """Mean total variation between the mixtures' distributions."""
    pair = (parts.mixture_BSV(gate).exp() for parts in (one, other))
    return float(torch.sub(*pair).abs().sum(-1).mean() / 2)


def load_export(export: Path, weights: Mapping[str, Weight], lmbda: float, *, attention: str) -> Any:
    """Load an export through its own code files and compare its tensors with what it was made from, bit for
    bit.

    Args:
        export: the directory.
        weights: the tensors that were to be written; read again, one at a time.
        lmbda: the weight that it must have.
        attention: of the loaded model.

    Raises:
        DamagedDataError: with what differs.
    """
    # AutoModelForCausalLM would use this package's own classes, which other users do not have.
    reference = json.loads((export / "config.json").read_bytes())["auto_map"]["AutoModelForCausalLM"]
    try:
        model_class: Any = get_class_from_dynamic_module(reference, str(export))
        loaded, report = model_class.from_pretrained(
            export, dtype="auto", attn_implementation=attention, output_loading_info=True
        )
    except Exception as error:  # any error while code and weights are loaded
        place = getattr(error, "filename", None)
        if isinstance(error, OSError) and place and not Path(place).is_relative_to(export):
            raise UserError(
                f"the export was to be tried, and its code is copied to {place} for that, which cannot be"
                f" written ({error.strerror}): set HF_HOME to a directory that can"
            ) from error
        raise _refusal(f"it does not load ({type(error).__name__}: {error})") from error
    if faults := {name: sorted(map(str, values)) for name, values in report.items() if values}:
        raise _refusal(f"transformers reports {faults}")
    if loaded.lmbda != lmbda:
        raise _refusal(f"its λ is {loaded.lmbda:g}, not {lmbda:g}")
    found = loaded.state_dict()
    tied = {name for name in found if name not in weights and _is_tied(found, name, weights)}
    differing = sorted(
        name
        for name in {*found, *weights} - tied
        if name not in found or name not in weights or not _same(found[name], weights[name].read())
    )
    if differing:
        raise _refusal(f"{len(differing)} tensors differ, the first is {differing[0]}")
    return loaded


def _is_tied(found: Mapping[str, torch.Tensor], name: str, weights: Mapping[str, Weight]) -> bool:
    """Whether a tensor that was not written shares its numbers with one that was."""
    return any(other in found and found[other].data_ptr() == found[name].data_ptr() for other in weights)


@torch.no_grad()
def compare_logits(loaded: Any, probe: Probe, gate: StoredGate, lmbda: float) -> float:
    """Log-probabilities with the export's gate, and at λ = 0, the export's λ and 1, within `LOGIT_BOUND` (a
    learned gate: `GATE_BOUND`) of those of the parts.

    Returns:
        the largest difference of log-probabilities, over the largest log-probability.

    Raises:
        DamagedDataError: they differ by more.
    """
    worst, threshold = 0.0, loaded.base_only_threshold
    loaded.base_only_threshold = None
    own = () if isinstance(gate, Constant) else (None,)
    for value in dict.fromkeys((*own, 0.0, lmbda, 1.0)):
        if value is not None:
            loaded.lmbda = value
        logits_BSV = loaded(input_ids=probe.ids_BS, use_cache=False).logits
        expected_BSV = probe.mixture_BSV(gate if value is None else Constant(value))
        difference = _relative_difference(logits_BSV.double().log_softmax(-1), expected_BSV)
        bound = GATE_BOUND if value is None else LOGIT_BOUND
        if not difference <= bound:
            named = "with the gate" if value is None else f"at λ = {value:g}"
            raise _refusal(
                f"log-probabilities {named} differ by {difference:.2g} relative, more than {bound:g}"
            )
        worst = max(worst, difference if value is not None else 0.0)
    loaded.base_only_threshold = threshold
    return worst


def _refusal(reason: str) -> DamagedDataError:
    return DamagedDataError(
        f"the written model is not the trained one: {reason}. Nothing was published: run the same command "
        "again; if this repeats, check the disk, and the version of transformers against requirements.txt"
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _relative_difference(found_BSV: torch.Tensor, expected_BSV: torch.Tensor) -> float:
    """max |found - expected| / max |expected|; infinities must be equal. NaN where either has one."""
    difference_BSV = torch.where(found_BSV == expected_BSV, 0.0, found_BSV - expected_BSV).abs()
    return float(difference_BSV.max() / expected_BSV[expected_BSV.isfinite()].abs().max())

"""Arms that weigh memories anew, after scoring: a memory by a gate (`--gate`), and the bank of several
memories (`--memory A B`) by a gate or by its best fixed weights; and the second language model of an ensemble
by a gate that was fitted to it. They have no units: all is made from what the members left.

A bank is mixed as one memory is: `(1 - Λ) p_base + Λ p_bank` with Λ the sum of the memories' weights and
p_bank their mixture by their shares of it.

N positions, M memories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.gates import FittedGate, GateManifest, WeightFigures, read_gate
from mlpmem_ds.models.gates import LearnedGate, load_gate
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.joint_parts import copied_gate
from mlpmem_ds.models.mixture import Weights
from mlpmem_ds.stages.evaluation.arms.arm import Part, Price, sum_of_logs
from mlpmem_ds.stages.evaluation.arms.base import ModelArm
from mlpmem_ds.stages.evaluation.arms.ensemble import EnsembleArm
from mlpmem_ds.stages.evaluation.arms.memory import MemoryArm, joint_of
from mlpmem_ds.stages.evaluation.arms.states import StatesArm
from mlpmem_ds.stages.evaluation.config import BANK, Config, gate_directories
from mlpmem_ds.stages.evaluation.splits import Split

Member: TypeAlias = MemoryArm | EnsembleArm
"""what a gate weighs against the base"""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class MixedArm:
    """Base and members at weights of their own."""

    name: str
    description: str
    part: Part
    members: tuple[Member, ...]
    price: Price
    settings: Mapping[str, Any]
    gate: LearnedGate | None = None
    """None: fixed weights, the best on the tuning split"""
    states: StatesArm | None = None
    """the arm that scores with a gate that reads hidden states"""
    fitted_to: frozenset[tuple[str, str]] = frozenset()
    """texts (SHA-256 of the corpus, split): it is not judged on them"""

    @property
    def names_of_weights(self) -> list[str]:
        """As they stand among what was chosen for a bank."""
        return [f"lambda_{member.name.removeprefix('base+')}" for member in self.members]

    def joint_model(self, lmbda: float, chosen: Mapping[str, float]) -> MemoryAugmentedLM | None:
        """Base and memories as one model that generates text, by the gate or at the chosen weights; None with
        a second language model."""
        memories = [member for member in self.members if isinstance(member, MemoryArm)]
        if len(memories) < len(self.members):
            return None
        joint = joint_of(memories, lmbda)
        if self.gate is not None:
            joint.set_gate(copied_gate(self.gate, joint.base.device))
        elif len(self.members) > 1:
            joint.set_gate(Weights(tuple(chosen[name] for name in self.names_of_weights)))
        return joint


def open_mixed_arms(
    config: Config,
    base: ModelArm,
    memories: Sequence[MemoryArm],
    ensembles: Sequence[EnsembleArm],
    tests: Sequence[Split],
) -> list[MixedArm]:
    """The bank of several memories, and an arm for each gate.

    Raises:
        UserError: a gate is of another base, vocabulary, memory or second model, or was fitted to a test
            split.
    """
    arms = [_bank(base, memories)] if len(memories) > 1 else []
    for name, root in gate_directories(config.gate).items():
        arm = _gated(name, read_gate(Path(root), flag="--gate"), base, (*memories, *ensembles))
        for split in tests:
            if (split.corpus.sha256, split.name) in arm.fitted_to:
                raise UserError(
                    f"--gate {root} was fitted to the {split.name} split of {split.corpus.root}: choose"
                    " another test split, or fit the gate to the tuning split"
                )
        arms.append(arm)
    return arms


def _bank(base: ModelArm, memories: Sequence[MemoryArm]) -> MixedArm:
    return MixedArm(
        name=f"base+{BANK}",
        description=(
            f"the base mixed with {len(memories)} memories at once, each with the weight that is best for all"
            " tokens together"
        ),
        part="subject",
        members=tuple(memories),
        price=_price(base, memories),
        settings={"memories": [arm.name for arm in memories]},
    )


def _gated(name: str, stored: FittedGate, base: ModelArm, given: Sequence[Member]) -> MixedArm:
    manifest = stored.manifest
    members = _members(stored, base, given)
    memories = tuple(member for member in members if isinstance(member, MemoryArm))
    gate = load_gate(manifest.gate, stored.weights)
    mixed = members[0].name if len(members) == 1 else f"base+{BANK}"
    price = _price(base, members)
    helper = StatesArm(
        name=f"weights_of_{name}",
        forward_pass=base.forward_pass,
        price=base.price,
        memories=memories,
        gate=gate,
        inputs={f"gate-{name}": stored.sha256},
    )
    return MixedArm(
        name=f"{mixed}+{name}",
        description=(
            f"the same as `{mixed}`, but a gate that was fitted to"
            f" {' and '.join(dict.fromkeys(text.name for text in manifest.texts))} gives the weight at each"
            f" token, from {_evidence_text(manifest)}"
        ),
        part="other" if memories else "control",
        members=members,
        gate=gate,
        states=helper if gate.reads else None,
        price=replace(
            price,
            parameters=price.parameters + sum(weight.numel() for weight in gate.parameters()),
            bytes=price.bytes + (stored.root / "gate.safetensors").stat().st_size,
            seconds=_sum([price.seconds, sum_of_logs([stored.root])]),
        ),
        settings={"gate": stored.sha256, "kind": manifest.gate["kind"]},
        fitted_to=frozenset((text.corpus, text.split) for text in manifest.texts),
    )


def _evidence_text(manifest: GateManifest) -> str:
    return {
        "history": "how sure both are and how well each predicted the tokens before",
        "confidences": "how sure both are",
        "router": "their hidden states and how sure they are",
    }.get(manifest.gate["kind"], "what is read of the position")


def _members(stored: FittedGate, base: ModelArm, given: Sequence[Member]) -> tuple[Member, ...]:
    """What a gate weighs, in its order."""
    manifest = stored.manifest
    if manifest.base != base.sha256:
        raise UserError(
            f"--gate {stored.root} was fitted for another base ({manifest.base[:12]}…) than --model"
            f" {base.path} ({base.sha256[:12]}…): fit one with this base"
        )
    by_hash = {arm.inputs[arm.name]: arm for arm in given}
    missing = [member for member in manifest.memories if member.sha256 not in by_hash]
    if missing:
        names = ", ".join(f"{member.name} ({member.sha256[:12]}…)" for member in missing)
        raise UserError(
            f"--gate {stored.root} weighs what neither --memory nor --ensemble names: {names}: give the"
            " directories that it was fitted with, or fit a gate for these"
        )
    return tuple(by_hash[member.sha256] for member in manifest.memories)


def _price(base: ModelArm, members: Sequence[Member]) -> Price:
    """Of the base and its members; what they have in common, such as keys, is counted for each."""
    own, prices = base.price, [arm.price for arm in members]
    tokens = [price.tokens for price in prices]
    return Price(
        parameters=own.parameters + sum(price.parameters - own.parameters for price in prices),
        bytes=own.bytes + sum(price.bytes - own.bytes for price in prices),
        seconds=_sum([price.seconds for price in prices]),
        tokens=None if None in tokens else sum(count for count in tokens if count is not None),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def figures_of_weights(weights_NM: np.ndarray) -> WeightFigures:
    """Means of each memory's weight over a text, and mean and quantiles of their sum."""
    totals_N = weights_NM.sum(axis=1)
    return WeightFigures(
        means=tuple(float(mean) for mean in weights_NM.mean(axis=0)),
        mean=float(totals_N.mean()),
        quantiles=tuple(float(value) for value in np.quantile(totals_N, _QUANTILES)),
    )

"""Part of `sweep`: what is varied around which centre; a setting is a preset of `quality` with one text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlpmem_ds.benchmarks.quality.plan import Plan, Planner
from mlpmem_ds.benchmarks.quality.presets import PRESETS, Preset, Text

ARMS = ("memory", "memory_ce", "paper", "paper_ce", "continued")
"""that are trained in each setting, by the names of quality/arms.py"""
_MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How well the base was trained, how much text there is, how often it is read."""

    base_epochs: int
    """of the base, on the general text"""
    megabytes: float
    """of the domain text's train split; its tuning and test split are those of every setting"""
    epochs: int
    """of every arm"""

    @property
    def name(self) -> str:
        return f"base-{self.base_epochs}-text-{self.megabytes:g}-epochs-{self.epochs}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One setting, and others that differ from it in one thing."""

    centre: Setting
    axes: Mapping[str, tuple[float, ...]]
    """field of `Setting` → its values, the centre's among them"""

    def settings(self) -> list[Setting]:
        """Each once, the centre first."""
        found = {self.centre.name: self.centre}
        for axis in self.axes:
            found |= {setting.name: setting for setting in self.along(axis)}
        return list(found.values())

    def along(self, axis: str) -> list[Setting]:
        """The settings of one axis in the order of its values."""
        kind = type(getattr(self.centre, axis))
        return [replace(self.centre, **{axis: kind(value)}) for value in self.axes[axis]]


SWEEP = Sweep(
    centre=Setting(base_epochs=20, megabytes=0.15, epochs=4),
    axes={"epochs": (1, 2, 4, 8), "megabytes": (0.05, 0.15, 0.45), "base_epochs": (2, 6, 20)},
)
_TEXT = Text(
    title="docstrings of PyTorch",
    inputs=("docs:torch",),
    flags=("--shorten-documents", "3000"),
    max_bytes=0.6 * _MEGABYTE,
    tuning_fraction=0.06,
    test_fraction=0.1,
    arms=ARMS,
)
PRESET = replace(PRESETS["tiny"], domain=_TEXT)
"""of every setting, but for its epochs and its training text"""


def base_plan(preset: Preset, base_epochs: int, root: Path) -> Plan:
    """A base trained on the general text for so many epochs; it is left in `root / "base"`."""
    planner = Planner(preset=replace(preset, base_epochs=base_epochs), root=root)
    planner.add_corpus("general", tokenizer=f"train:{preset.vocab_size}")
    planner.add_base()
    return planner.plan()


def setting_plan(preset: Preset, setting: Setting, root: Path, *, base: Path, num_seeds: int) -> Plan:
    """The arms of a setting below `root`, and a report a seed."""
    domain = replace(preset.domain, max_train_bytes=setting.megabytes * _MEGABYTE)
    preset = replace(
        preset,
        domain=domain,
        epochs=setting.epochs,
        models=("--early-stopping-patience", "none", "--select", "best"),
        model_epochs=setting.epochs,
    )
    planner = Planner(preset=preset, root=root, given_base=str(base), has_gates=False)
    planner.add_corpus("domain", tokenizer=str(base))
    planner.add_datastore("domain")
    for seed in range(num_seeds):
        planner.add_trainings("domain", seed)
    for seed in range(num_seeds):
        planner.add_own_report("domain", seed)
    return planner.plan()

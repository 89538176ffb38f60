"""A made-up result of a sweep."""

from __future__ import annotations

from mlpmem_ds.benchmarks.sweep.results import ArmChange, SettingResult, SweepResult


def arm_change(change: float) -> ArmChange:
    return ArmChange(change=change, by_seed=(change - 0.01, change + 0.01), interval=(change - 0.1, 0.0))


def make_result() -> SweepResult:
    def setting(base_epochs: int, epochs: int, memory: float) -> SettingResult:
        return SettingResult(
            base_epochs=base_epochs,
            megabytes=0.5,
            epochs=epochs,
            positions=100_000,
            base_ppl=20.0,
            arms={"base+memory": arm_change(memory), "continued": arm_change(-0.2)},
        )

    return SweepResult(
        date="2026-01-02",
        machine="a processor",
        base="a base",
        general="a text",
        domain="a manual",
        seeds=2,
        axes={"epochs": (1, 2), "base_epochs": (3, 9)},
        settings=(setting(3, 1, -0.1), setting(3, 2, -0.3), setting(9, 1, -0.15)),
        has_one_test_text=True,
    )

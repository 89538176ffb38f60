"""`bench sweep`: all arms at several numbers of epochs, sizes of corpus and qualities of the base."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlpmem_ds.benchmarks.common import check_places, describe_machine
from mlpmem_ds.benchmarks.quality.arms import BASE, KNN_INDEX
from mlpmem_ds.benchmarks.quality.figures import FIXED_ARMS, change_of, read_reports
from mlpmem_ds.benchmarks.quality.jobs import runner_of
from mlpmem_ds.benchmarks.quality.page import publish_sweep
from mlpmem_ds.benchmarks.quality.plan import Plan
from mlpmem_ds.benchmarks.quality.presets import Preset
from mlpmem_ds.benchmarks.sweep.results import (
    FILE_NAME,
    ArmChange,
    SettingResult,
    SweepResult,
    plot_sweep,
    write_sweep,
)
from mlpmem_ds.benchmarks.sweep.settings import PRESET, SWEEP, Setting, Sweep, base_plan, setting_plan
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import num_tokens_of_splits

_logger = logging.getLogger("mlpmem_ds.benchmarks")


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """When a memory that imitates the retriever wins, when cross entropy alone, when training the base on.

    Eight settings around one, on bases that are trained on the spot: half an hour on two cores. The same
    command continues what was interrupted.
    """

    example: ClassVar[str] = "python tools/bench.py sweep --output runs/sweep"

    output: Path = option("directory of all stages, and of sweep.json")
    seeds: int = option("trainings of each trained arm", 3, at_least=1)
    jobs: int | None = option("stages that run at once (default: the machine's cores)", None, at_least=1)
    page: Path | None = option(
        "page to write too, such as docs/RESULTS.md: of this result and of those in the folder results next"
        " to it",
        None,
    )


def run(config: Config, world: World) -> None:
    """Do what is missing, and write sweep.json, its figure and the page."""
    run_sweep(PRESET, SWEEP, config)


def run_sweep(preset: Preset, sweep: Sweep, config: Config) -> SweepResult:
    """The same with any preset and settings.

    Raises:
        UserError: --output is a file, --page is in no folder, or a job failed.
    """
    check_places(config.output, config.page, name="sweep")
    root = config.output.absolute()
    found, settings = [], sweep.settings()
    for number, setting in enumerate(settings, start=1):
        _logger.info("setting %d of %d: %s", number, len(settings), setting.name)
        base_root = root / f"base-{setting.base_epochs}"
        runner_of(base_root, config.jobs).run(base_plan(preset, setting.base_epochs, base_root).jobs)
        setting_root = root / setting.name
        plan = setting_plan(preset, setting, setting_root, base=base_root / "base", num_seeds=config.seeds)
        runner_of(setting_root, config.jobs).run(plan.jobs)
        found.append(setting_result(setting, plan, setting_root))
    machine = describe_machine()
    result = SweepResult(
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        machine=f"{machine['processor']}, {machine['cores']} cores",
        base=str(preset.base_title),
        general=preset.general.title,
        domain=preset.domain.title,
        seeds=config.seeds,
        axes=sweep.axes,
        settings=tuple(found),
        has_one_test_text=True,
    )
    root.mkdir(parents=True, exist_ok=True)
    write_sweep(root / FILE_NAME, result)
    plot_sweep(result, root / "sweep.png")
    if config.page is not None:
        publish_sweep(config.page, result)
        _logger.info("the page is %s", config.page)
    return result


def setting_result(setting: Setting, plan: Plan, root: Path) -> SettingResult:
    """The arms of a setting whose jobs are complete."""
    tested = read_reports([root / place.name for place in plan.reports], FIXED_ARMS).tested
    arms = {}
    for arm in tested.sums:
        if arm not in (BASE, KNN_INDEX):
            change = change_of(arm, tested)
            arms[arm] = ArmChange(change=change.value, by_seed=change.by_seed, interval=change.interval)
    return SettingResult(
        base_epochs=setting.base_epochs,
        megabytes=setting.megabytes,
        epochs=setting.epochs,
        positions=num_tokens_of_splits(root / "domain" / "corpus")["train"] - 1,
        base_ppl=tested.ppl(BASE, 0),
        arms=arms,
    )

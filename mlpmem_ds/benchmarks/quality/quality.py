"""Benchmark `quality`: **is the memory worth its parameters?** From text to a table, with controls and seeds.

A preset names two texts, a base and arms; every trained arm is trained with several seeds, everything that is
chosen is chosen off the test split, and arms that win against the memory stand in the same table. Started
again, the same command continues: a job is a stage, and a stage continues in its units.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from mlpmem_ds.benchmarks.common import check_places, describe_machine, describe_versions
from mlpmem_ds.benchmarks.quality.figures import text_result
from mlpmem_ds.benchmarks.quality.jobs import JobRunner, runner_of
from mlpmem_ds.benchmarks.quality.joined import join_results, read_others
from mlpmem_ds.benchmarks.quality.page import publish_page
from mlpmem_ds.benchmarks.quality.plan import QUESTIONS_JOB, TEXTS, Plan, make_plan
from mlpmem_ds.benchmarks.quality.presets import PRESETS, Preset
from mlpmem_ds.benchmarks.quality.results import FILE_NAME, QualityResult, write_result
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.manifest import CompleteStage, read_stage
from mlpmem_ds.core.shipped import ds_configs
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.answers import read_answers
from mlpmem_ds.formats.fetched_base import FetchedBaseManifest
from mlpmem_ds.formats.question_files import read_questions

_logger = logging.getLogger("mlpmem_ds.benchmarks")
_CUT = ("--cut-documents", "4000")
"""of texts that flags name: intervals draw whole documents, and a book is one"""


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """All arms on two texts, with several seeds, from text to table; docs/RESULTS.md is made of it.

    On two cores with other light work and three seeds, tiny took 13 to 30 minutes, small 2½ hours and
    real (a pretrained --base) 3½ hours. The same command continues what was interrupted.
    """

    example: ClassVar[str] = "python tools/bench.py quality --preset tiny --output runs/quality-tiny"

    output: Path = option("directory of all stages, and of quality.json")
    preset: Literal["tiny", "small", "real"] = option("which texts, base and arms", "tiny")
    base: str | None = option("with real: the pretrained base, a directory or Hub name", None)
    general: tuple[str, ...] = option(
        "text that the base is for (small: it is trained on it), in place of the preset's", (), metavar="PATH"
    )
    domain: tuple[str, ...] = option(
        "text that is new to the base, in place of the preset's", (), metavar="PATH"
    )
    ds_config: Path | None = option(
        "DeepSpeed configuration of all trainings (default: of tiny cpu.json, else zero1.json, whose"
        " bfloat16 products are twice as fast where the processor has them)",
        None,
    )
    dtype: Literal["float32", "bfloat16"] | None = option(
        "of forward passes that do not train (default: of tiny float32, else bfloat16)", None
    )
    questions: tuple[Path, ...] = option(
        "files of questions (docs/questions.md), of which the first 200 are asked: the first seed's memory"
        " under its gate, models and passages of the domain text",
        (),
        metavar="FILE",
    )
    seeds: int = option("trainings of each trained arm", 3, at_least=1)
    first_seed: int = option(
        "number of the first one: a run can hold the seeds that another lacks", 0, at_least=0
    )
    join: tuple[Path, ...] = option(
        "quality.json of runs of the same preset with other seeds, such as docs/results/small.json, whose"
        " seeds are to stand in the result too",
        (),
        metavar="FILE",
    )
    jobs: int | None = option("stages that run at once (default: the machine's cores)", None, at_least=1)
    page: Path | None = option(
        "page to write too, such as docs/RESULTS.md: of this result and of the other presets' in the folder"
        " results next to it",
        None,
    )

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.seeds))

    def check(self) -> None:
        if (self.preset == "real") != (self.base is not None):
            raise UserError(
                f"--preset {self.preset} trains its own base: leave out --base, or choose --preset real"
                if self.base is not None
                else "--preset real needs --base, a directory or Hub name of a pretrained model"
            )
        if self.ds_config is not None and not self.ds_config.is_file():
            raise UserError(
                f"--ds_config {self.ds_config}: no such file; the shipped ones are in ds_configs/"
            )


def run(config: Config, world: World) -> None:
    """Do what is missing of a preset, and write quality.json and the page."""
    preset = _with_texts(PRESETS[config.preset], config)
    if config.ds_config is not None:
        preset = replace(preset, ds_config=str(config.ds_config.absolute()))
    if config.dtype is not None:
        preset = replace(preset, dtype=config.dtype)
    run_preset(preset, config)


def run_preset(preset: Preset, config: Config) -> QualityResult:
    """The same with any preset.

    Raises:
        UserError: --output is a file, a job failed, a file of --questions cannot be read, or --join names
            results that do not fit.
    """
    check_places(config.output, config.page, name="quality")
    others = read_others(config.join, _settings(preset, config), config.seed_numbers)
    for path in config.questions:
        read_questions(path)  # a fault there would end the run at its last job
    root = config.output.absolute()
    plan = make_plan(
        preset,
        root,
        seeds=config.seed_numbers,
        base=config.base,
        questions=[path.absolute() for path in config.questions],
    )
    runner = runner_of(root, config.jobs)
    runner.run(plan.jobs)
    result = collect(preset, plan, runner, config)
    write_result(root / FILE_NAME, result)  # it stays where the others cannot be joined
    if others:
        result = join_results([result, *others])
        write_result(root / FILE_NAME, result)
    if config.page is not None:
        publish_page(config.page, result)
        _logger.info("the page is %s", config.page)
    return result


def collect(preset: Preset, plan: Plan, runner: JobRunner, config: Config) -> QualityResult:
    """The result of a plan whose jobs are complete."""
    texts, ratios = [], []
    by_name = {"general": preset.general, "domain": preset.domain}
    for name in TEXTS:
        (other,) = (text for key, text in by_name.items() if key != name)
        result, found = text_result(name, by_name[name], other, plan, runner.root)
        texts.append(result)
        ratios += found
    machine = describe_machine()
    return QualityResult(
        preset=preset.name,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        machine=f"{machine['processor']}, {machine['cores']} cores, {runner.at_once} jobs at once",
        versions=describe_versions(),
        settings=_settings(preset, config),
        seeds=config.seed_numbers,
        left_out=plan.left_out,
        base=_describe_base(preset, config),
        texts=tuple(texts),
        ratios=tuple(ratios),
        questions=read_answers(runner.root / QUESTIONS_JOB).sets if config.questions else (),
        job_seconds={job.name: runner.recorded_seconds(job) for job in plan.jobs},
    )


def _settings(preset: Preset, config: Config) -> dict[str, str]:
    """The flags that say how it was run, without places on this machine."""
    flags: dict[str, str] = {"preset": config.preset}
    for name in ("general", "domain"):
        if paths := getattr(config, name):
            flags[name] = " ".join(Path(path).name for path in paths)
    if config.ds_config is not None:
        name, shipped = config.ds_config.name, ds_configs() / config.ds_config.name
        is_shipped = shipped.is_file() and shipped.samefile(config.ds_config)
        flags["ds_config"] = f"ds_configs/{name}" if is_shipped else name
    if "bfloat16" in (preset.dtype, PRESETS[config.preset].dtype):
        flags["dtype"] = preset.dtype
    return flags | ({} if config.base is None else {"base": Path(config.base).name})


def _describe_base(preset: Preset, config: Config) -> str:
    if preset.base_title is not None:
        return preset.base_title
    base = Path(str(config.base))
    return f"`{base.name}`{_fetched_from(base)}, pretrained by others"


def _fetched_from(base: Path) -> str:
    """The package of a base that `fetch_base` made, in words; "" of another."""
    try:
        fetched: CompleteStage[FetchedBaseManifest] = read_stage(
            CompleteStage, FetchedBaseManifest, base, flag="--base"
        )
    except UserError:
        return ""
    return f" (`fetch_base` of {fetched.manifest.source.package or 'a GGUF file'}: see base.md)"


def _with_texts(preset: Preset, config: Config) -> Preset:
    """The preset with the texts that flags name."""
    if config.general:
        title = f"`{', '.join(Path(path).name for path in config.general)}`"
        preset = replace(
            preset, general=replace(preset.general, title=title, inputs=config.general, flags=_CUT)
        )
    if config.domain:
        title = f"`{', '.join(Path(path).name for path in config.domain)}`"
        preset = replace(preset, domain=replace(preset.domain, title=title, inputs=config.domain, flags=_CUT))
    return preset

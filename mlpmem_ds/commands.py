"""The commands: `mlpmem-train …` where the package is installed, `python -m mlpmem_ds train …` anywhere; the
files of tools/ and launch/ call the same functions.

With a launcher: `torchrun --nproc-per-node 2 -m mlpmem_ds extract-keys …`, `deepspeed --module mlpmem_ds
train …`. A command is loaded when it runs, its libraries when its flags have been read.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlpmem_ds

_PREFIX = "mlpmem-"
# Of the commands that are plain functions.
_SUMMARIES = {
    "bench": "Side-by-side measurements on this machine, written as JSON.",
    "fit-scaling": "Perplexity against parameters and compute, decoder alone and decoder + memory.",
    "fuzz-readers": "Damaged files of every kind that is read: none lost in silence, no hang, no crash.",
}


class Command:
    """A command; called, it reads its flags, runs, and returns the exit code.

    `config` and `run` are "module:name" below `mlpmem_ds.stages`. The module of `config` is cheap to import.
    No dataclass: this file is imported before Ctrl-C is a line, so it imports little.
    """

    def __init__(self, *, config: str, run: str) -> None:
        self.config, self.run = config, run

    def __call__(self, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
        name = _name_of_process() if prog is None else prog

        def act() -> int:
            from mlpmem_ds.core.front_end import run_front_end, seldom_collected

            def run(config: Any, world: Any) -> Any:
                with seldom_collected():
                    function = _load(self.run)
                return function(config, world)

            return run_front_end(_load(self.config), run, argv=argv, prog=name)

        return _guarded(act, name)

    def check(self, argv: Sequence[str], *, prog: str) -> int:
        """Read the flags as the command does, and run nothing: 0, or 2 with what is wrong with them."""

        def act() -> int:
            from mlpmem_ds.core.front_end import check_flags

            return check_flags(_load(self.config), argv, prog=prog)

        return _guarded(act, prog)

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        from mlpmem_ds.core.config import description_of

        return description_of(_load(self.config)).partition("\n")[0]


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"mlpmem_ds.stages.{module}"), name)


prepare_corpus = Command(config="corpus.config:Config", run="corpus.prepare_corpus:run")
fetch_base = Command(config="fetching.config:Config", run="fetching.fetch_base:run")
train_base = Command(config="base.config:Config", run="base.train_base:run")
train_baseline = Command(config="baseline.config:Config", run="baseline.train_baseline:run")
extract_keys = Command(config="keys.config:Config", run="keys.extract_keys:run")
build_index = Command(config="index.config:Config", run="index.build_index:run")
write_targets = Command(config="targets.config:Config", run="targets.write_targets:run")
train = Command(config="training.config:Config", run="training.train:run")
fit_gate = Command(config="gating.config:Config", run="gating.fit_gate:run")
evaluate = Command(config="evaluation.config:Config", run="evaluation.evaluate:run")
convert_checkpoint = Command(config="conversion.config:Config", run="conversion.convert_checkpoint:run")
generate = Command(config="generation.config:Config", run="generation.generate:run_on_terminal")
answer_questions = Command(config="questions.config:Config", run="questions.answer_questions:run")
run_lm_eval = Command(config="harness.config:Config", run="harness.run_lm_eval:run")
import_datastore = Command(config="exchange.config:ImportConfig", run="exchange.import_datastore:run")
export_datastore = Command(config="exchange.config:ExportConfig", run="exchange.export_datastore:run")
plan = Command(config="planning.config:Config", run="planning.table:run_as_table")
view_report = Command(config="viewing.config:Config", run="viewing.view_report:run")
mirror = Command(config="mirroring.config:Config", run="mirroring.mirror:run")
inspect_run = Command(config="inspection.config:Config", run="inspection.inspect_run:run")


def bench(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the benchmark that the first word names."""
    name = _name_of_process() if prog is None else prog

    def run() -> int:
        from mlpmem_ds.benchmarks.bench import main as run_benchmark

        return run_benchmark(argv, prog=name)

    return _guarded(run, name)


def fuzz_readers(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Damage files of every kind that is read, and look for what is lost in silence, hangs or crashes."""
    from mlpmem_ds.benchmarks.fuzz.fuzz_readers import main as run_fuzz

    return run_fuzz(argv, prog=prog)


def fit_scaling(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Fit perplexity to parameters and compute, for a decoder alone and with a memory."""
    name = _name_of_process() if prog is None else prog

    def act() -> int:
        from mlpmem_ds.benchmarks.scaling.config import Config
        from mlpmem_ds.core.front_end import run_front_end, seldom_collected

        def run(config: Any, world: Any) -> Any:
            with seldom_collected():
                from mlpmem_ds.benchmarks.scaling.fit_scaling import run as fit
            return fit(config, world)

        return run_front_end(Config, run, argv=argv, prog=name)

    return _guarded(act, name)


COMMANDS: dict[str, Callable[..., int]] = {
    "prepare-corpus": prepare_corpus,
    "fetch-base": fetch_base,
    "train-base": train_base,
    "train-baseline": train_baseline,
    "extract-keys": extract_keys,
    "build-index": build_index,
    "write-targets": write_targets,
    "train": train,
    "fit-gate": fit_gate,
    "evaluate": evaluate,
    "convert-checkpoint": convert_checkpoint,
    "generate": generate,
    "answer-questions": answer_questions,
    "run-lm-eval": run_lm_eval,
    "import-datastore": import_datastore,
    "export-datastore": export_datastore,
    "plan": plan,
    "bench": bench,
    "fit-scaling": fit_scaling,
    "fuzz-readers": fuzz_readers,
    "mirror": mirror,
    "inspect-run": inspect_run,
    "view-report": view_report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m mlpmem_ds NAME …`; the exit code."""
    return _guarded(lambda: _run_command(argv), "mlpmem_ds")


def _guarded(act: Callable[[], int], prog: str) -> int:
    """The one place where errors end (core/front_end.py), and Ctrl-C also while that is loaded."""
    try:
        from mlpmem_ds.core.front_end import guarded
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; the same command continues where it was\n")
        return 130
    return guarded(lambda _: act(), prog=prog)


def _name_of_process() -> str:
    """As the process was called, without its folder."""
    return sys.argv[0].rpartition("/")[2]


def _run_command(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("--local_rank="):  # deepspeed --module puts it before the command's name
        words = [*words[1:], words[0]]
    if words[:1] == ["--check"]:
        return _check_flags(words[1:])
    name = words[0].replace("_", "-") if words else ""
    if name in COMMANDS:
        return COMMANDS[name](words[1:], prog=_PREFIX + name)
    if len(words) == 1 and words[0] in _ANSWERS:
        sys.stdout.write(_ANSWERS[words[0]]() + "\n")
        return 0
    mistake = f"error: there is no command {words[0]!r}\n" if words else ""
    sys.stderr.write(f"{mistake}{_usage()}\n")
    return 2


def _check_flags(words: Sequence[str]) -> int:
    name = words[0].replace("_", "-") if words else ""
    command = COMMANDS.get(name)
    if isinstance(command, Command):
        return command.check(words[1:], prog=_PREFIX + name)
    sys.stderr.write(f"error: --check reads the flags of a command such as train, not of {name!r}\n")
    return 2


def _usage() -> str:
    lines = [
        "usage: python -m mlpmem_ds COMMAND …         (also installed as mlpmem-COMMAND)",
        "       python -m mlpmem_ds COMMAND --help    its flags",
        "       python -m mlpmem_ds --check COMMAND … read its flags, and run nothing",
        "       python -m mlpmem_ds --version",
        "       python -m mlpmem_ds --ds-configs      the directory of DeepSpeed configurations",
        "",
        "commands:",
    ]
    for name, command in COMMANDS.items():
        summary = command.summary if isinstance(command, Command) else _SUMMARIES[name]
        lines.append(f"  {name:20s} {summary}")
    return "\n".join(lines)


def _ds_configs() -> str:
    from mlpmem_ds.core.shipped import ds_configs

    return str(ds_configs())


_ANSWERS = {
    "--version": lambda: f"mlpmem-ds {mlpmem_ds.__version__}",
    "--ds-configs": _ds_configs,
    "--help": _usage,
    "-h": _usage,
}

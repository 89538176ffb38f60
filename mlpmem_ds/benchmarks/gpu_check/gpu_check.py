"""`tools/gpu_check.sh`: **the steps one after another**, each in a process that ends when its time is over.

What a step has measured by then counts; its failure does not stop the next one. Exit codes: 0 all is well, 1
a step failed or missed a goal, 2 the machine lacks what is needed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mlpmem_ds.benchmarks.gpu_check.figures import Figure, as_json, read_figures
from mlpmem_ds.benchmarks.gpu_check.steps import STEPS, Step, figures_path, steps_for
from mlpmem_ds.core.config import Flags, option, parse_config, plain_values
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.front_end import Run, guarded
from mlpmem_ds.core.output_files import check_output_file

NEEDED = (
    "torch",
    "numpy",
    "deepspeed",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "accelerate",
    "faiss",
    "webdataset",
    "zstandard",
    "tensorboard",
    "matplotlib",
    "tqdm",
    "fsspec",
    "triton",
    "pytest",
    "hypothesis",
)
_LAST_LINES = 12
_SECONDS_TO_END = 5.0
Outcome = Literal["done", "failed", "cut off"]


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Check all that needs a GPU on this machine, each step with its figure and its goal, in 15 minutes.

    With --rehearse the same command lines run at tiny sizes on a CPU, in two minutes or so.
    """

    example: ClassVar[str] = "bash tools/gpu_check.sh --output gpu_check.json"

    output: Path = option("JSON file to write")
    gpus: int = option("GPUs to use; with 2 or more, steps with a rank on each follow", 1, at_least=1)
    rehearse: bool = option("tiny sizes on the CPU, to try every command line; speeds are not judged", False)
    only: str | None = option("steps to do, by name, with commas", None, metavar="NAME[,NAME]")
    max_seconds: float = option(
        "time of the steps of one GPU together; what is left then is not done", 900.0, above=0
    )
    work: Path | None = option(
        "directory for what the steps write, 12 GB; kept (default: a temporary one, removed)", None
    )

    def check(self) -> None:
        chosen_steps(self)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a step."""

    step: Step
    outcome: Outcome
    seconds: float
    figures: Sequence[Figure]
    said: str = ""
    """the end of what the step wrote, where it did not end well"""

    @property
    def is_ok(self) -> bool:
        return self.outcome == "done" and all(figure.is_met for figure in self.figures)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.step.name,
            "meaning": self.step.meaning,
            "passed": self.is_ok,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 2),
            "figures": [as_json(figure) for figure in self.figures],
            "said": self.said,
        }


def chosen_steps(config: Config) -> list[Step]:
    """Those of `--only`, else all that `--gpus` allows.

    Raises:
        UserError: a name is not a step's, or the step needs more GPUs.
    """
    steps = steps_for(config.gpus)
    if config.only is None:
        return steps
    by_name = {step.name: step for step in steps}
    names = config.only.split(",")
    if unknown := [name for name in names if name not in by_name]:
        later = [step.name for step in STEPS if step.num_gpus > config.gpus]
        raise UserError(
            f"--only {','.join(unknown)}: the steps are {', '.join(by_name)}"
            + (f", and with --gpus 2 or more {', '.join(later)}" if later else "")
        )
    return [by_name[name] for name in names]


def check_packages() -> None:
    """Refuse a machine without what the steps import, before minutes are spent.

    Raises:
        UserError: names what is missing.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{sys.executable} lacks {', '.join(missing)}: bash launch/setup.sh makes .venv with all that is"
            " needed (in an environment with its own torch: pip install --no-build-isolation '.[gpu,test]',"
            " or '.[cpu,test]' without flash-attn and faiss-gpu)"
        )


def check_gpus(config: Config) -> None:
    """Refuse a machine with fewer GPUs than asked for.

    Raises:
        UserError: says how many PyTorch sees.
    """
    if config.rehearse:
        return
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count(), torch.__version__)"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    count, _, version = done.stdout.strip().partition(" ")
    if not count.isdigit():
        raise UserError(f"torch cannot be imported: {done.stderr.strip().rpartition(chr(10))[2]}")
    if int(count) < config.gpus:
        raise UserError(
            f"--gpus {config.gpus}: torch {version} sees {count} (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}); without a GPU: --rehearse"
        )


def environment_of_steps(config: Config, environment: Mapping[str, str]) -> dict[str, str]:
    """Each step's: this checkout's package first; in a rehearsal no GPU, and one thread."""
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    if config.rehearse:
        ours |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return {**environment, **ours}


def run_in_process(step: Step, config: Config, work: Path, seconds: float) -> Result:
    """Do a step in a process group of its own, at most so many seconds."""
    log = work / f"{step.name}.log"
    size = "rehearsal" if config.rehearse else "full"
    words = [step.name, str(work), str(config.gpus), size]
    began = time.monotonic()
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlpmem_ds.benchmarks.gpu_check.steps", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment_of_steps(config, os.environ),
            start_new_session=True,
        )
        outcome: Outcome = "cut off"
        try:
            outcome = "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_group(process)
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    return Result(
        step=step,
        outcome=outcome,
        seconds=time.monotonic() - began,
        figures=read_figures(figures_path(work, step.name)),
        said="" if outcome == "done" else "\n".join(lines[-_LAST_LINES:]),
    )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the step has started; a rank that does not listen is killed."""
    for number, seconds in ((signal.SIGTERM, _SECONDS_TO_END), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


Start = Callable[[Step, Config, Path, float], Result]


def run(
    config: Config, *, start: Start = run_in_process, write: Callable[[str], object] = sys.stdout.write
) -> int:
    """Do the steps; 0 if all are OK, else 1.

    Args:
        start: does one step.
        write: gets the lines for the terminal.
    """
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix=".gpu-check-", dir=config.output.parent) as temporary:
        work = (Path(temporary) if config.work is None else config.work).resolve()
        work.mkdir(parents=True, exist_ok=True)
        left = config.max_seconds
        for step in chosen_steps(config):
            if step.num_gpus > 1:  # the quarter of an hour is that of the steps of one GPU
                left = max(left, step.max_seconds)
            figures_path(work, step.name).unlink(missing_ok=True)
            if left < 1:
                result = Result(step=step, outcome="cut off", seconds=0.0, figures=(), said="no time left")
            else:
                result = start(step, config, work, min(step.max_seconds, left))
            left -= result.seconds
            results.append(result)
            write(described(result))
            publish_json(config.output, report(config, results))
    failed = [result.step.name for result in results if not result.is_ok]
    total = sum(result.seconds for result in results)
    end = f"FAIL: {', '.join(failed)}" if failed else "all steps are OK"
    write(f"{end}; {total:.0f} s; {config.output}\n")
    return 1 if failed else 0


def report(config: Config, results: Sequence[Result]) -> dict[str, Any]:
    """The JSON, also of a check that is not at its end."""
    return {
        "name": "gpu_check",
        "settings": plain_values(config),
        "passed": all(result.is_ok for result in results),
        "steps": [result.to_json() for result in results],
    }


def described(result: Result) -> str:
    """The lines of a step: OK or FAIL, then its figures, a missed one marked."""
    word = "OK" if result.is_ok else "FAIL"
    what = result.step.meaning if result.outcome == "done" else f"{result.outcome}: {result.step.meaning}"
    lines = [f"{word:<5}{result.step.name:<18}{result.seconds:>6.1f} s  {what}"]
    lines += [f"       {'' if figure.is_met else 'MISSED '}{figure}" for figure in result.figures]
    lines += [f"       | {line}" for line in result.said.split("\n") if line]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, look at the machine, run."""
    prog = "gpu_check.sh"

    def check(_: Run) -> int:
        config = parse_config(Config, sys.argv[1:] if argv is None else list(argv), prog=prog)
        check_output_file(config.output, example="gpu.json")
        check_packages()
        check_gpus(config)
        return run(config)

    return guarded(check, prog=prog)

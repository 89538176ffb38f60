"""The small pipeline that is rehearsed, and what two runs of it must have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hosts import REPOSITORY

# One command a line: the directory that it writes, its program, its flags. Paths lie in the run directory.
_COMMANDS = """
corpus tools/prepare_corpus.py --input text --output corpus --tokenizer train:300 --processes 1
    --block-size 32 --stride 16 --tuning-fraction .15 --test-fraction .15 --seed 3
base tools/train_base.py --ds-config {root}/ds_configs/cpu.json --corpus corpus --output base
    --num-layers 2 --hidden-size 32 --num-heads 2 --epochs 1 --batch-tokens 512
    --log-every-steps 1 --save-every-steps 5
keys tools/extract_keys.py --model base --corpus corpus --output keys --unit-positions 256
index tools/build_index.py --keys keys --output index --factory IVF8,PQ4 --num-shards 2
targets tools/write_targets.py --keys keys --index index --corpus corpus --output targets --search ivf
    --nprobe 4 --k 32 --neighbour-perplexity 10 --exclude same-document --shard-positions 256
memory launch/train.py --ds-config zero3.json --corpus corpus --keys keys --targets targets --model base
    --head base --output memory --num-blocks 2 --epochs 3 --batch-positions 128 --micro-batch-positions 64
    --shuffle-window-blocks 4 --log-every-steps 1 --save-every-steps 5
report launch/evaluate.py --model base --corpus corpus --keys keys --index index --targets targets
    --memory memory --output report --nprobe 4 --speed-positions 16 --samples 1 --bootstrap-samples 100
    --unit-positions 64
export tools/convert_checkpoint.py --checkpoint memory --model base --report report --output export
"""
ALONE = ("corpus", "export")
"""stages of one process; the others have ranks"""
_DATA = (".npy", ".bin", ".tar", ".zst", ".index.json", ".faissindex", ".safetensors", "tokenizer.json")
_OF_ONE_RUN = ("checkpoints", "done")
_ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1000000000,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000},
}


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline."""

    name: str
    program: str
    flags: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return [str(REPOSITORY / self.program), *self.flags]


def stages() -> list[Stage]:
    lines = _COMMANDS.replace("{root}", str(REPOSITORY)).strip().replace("\n ", " ").splitlines()
    return [Stage(name, program, tuple(flags)) for name, program, *flags in map(str.split, lines)]


def stage_named(name: str) -> Stage:
    return next(stage for stage in stages() if stage.name == name)


def write_config(run: Path) -> None:
    """The DeepSpeed configuration of the memory: ds_configs/cpu.json with ZeRO 3."""
    (run / "zero3.json").write_text(json.dumps(_ZERO_3), encoding="utf-8")


def is_complete(run: Path, name: str) -> bool:
    last = "mlpmem_export.json" if name == "export" else "manifest.json"
    return (run / name / last).is_file()


def data_of(directory: Path) -> dict[str, str]:
    """SHA-256 of a stage's data files, by name; not of logs, records and checkpoints, which hold times."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name.endswith(_DATA) and not name.startswith(_OF_ONE_RUN):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def losses_of(directory: Path) -> dict[int, float]:
    """The loss of each step of a training, in the order of the steps."""
    found = {}
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry: Mapping[str, Any] = json.loads(line)
        if "loss" in entry:
            found[int(entry["step"])] = float(entry["loss"])
    return found


def figures_of(report: Path) -> dict[str, float]:
    """The test perplexity of each arm of a report."""
    evaluation = json.loads((report / "eval.json").read_text(encoding="utf-8"))
    return {arm["name"]: arm["splits"]["test"]["ppl"] for arm in evaluation["arms"]}


def differences(run: Path, other: Path, stage: str) -> list[str]:
    """What a stage gave in one run and not in the other: data files, losses of its training, figures."""
    one, two = run / stage, other / stage
    files = data_of(one).items() ^ data_of(two).items()
    found = sorted(f"{stage}/{name}" for name in dict(files))
    if not found and not data_of(two) and stage != "report":
        found.append(f"{stage} has no data")
    if stage in ("base", "memory") and losses_of(one) != losses_of(two):
        found.append(f"losses: {losses_of(one)} and {losses_of(two)}")
    if stage == "report" and figures_of(one) != figures_of(two):
        found.append(f"perplexities: {figures_of(one)} and {figures_of(two)}")
    return found


def leftovers(run: Path) -> list[str]:
    """Claims and temporaries below a run directory."""
    patterns = (".*.claim", ".*.tmp", "*.tmp")
    return sorted({path.relative_to(run).as_posix() for one in patterns for path in run.rglob(one)})

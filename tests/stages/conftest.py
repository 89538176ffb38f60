"""Builders: a key directory, an eval.json of the test's own numbers, short trainings, forked."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2LMHeadModel

from mlpmem_ds.core.blocks import split_blocks
from mlpmem_ds.core.config import Flags
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import token_dtype, vocabulary_sha256
from mlpmem_ds.formats.evaluation import (
    ArmFigures,
    Calibration,
    CurvePoint,
    Evaluation,
    Machine,
    ReportManifest,
    Settings,
    SplitFigures,
    write_evaluation,
)
from mlpmem_ds.formats.keys import KeysManifest, file_name, unit_name
from mlpmem_ds.formats.trained_models import MemoryManifest, Provenance, write_weights
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

from ..joint_models import joined
from ..launcher_environment import environment_without_launchers
from ..manifests import codec_manifest, keys_manifest

_REPOSITORY = Path(__file__).resolve().parents[2]
_FORKED_TRAINING = Path(__file__).resolve().with_name("forked_training.py")
ForkedTraining = Callable[..., tuple[list[Any], list[str]]]


def make_arm(name: str, ppl: float, **changes: Any) -> ArmFigures:
    """An arm of this test perplexity; the base's other figures."""
    figures = {
        "ppl": ppl,
        "bits_per_byte": 1.0,
        "ppl_change": changes.get("ppl_change"),
        "ppl_interval": changes.get("ppl_interval"),
        "win_rate": None,
    }
    fields = {
        "description": "a way to predict",
        "splits": {split: SplitFigures(**figures) for split in ("tuning", "test")},
        "lmbda": None,
        "chosen": {},
        "tried": {},
        "parameters": 1000,
        "bytes": 4000,
        "tokens": None,
        "seconds": None,
        "tokens_per_second": 100.0,
        "calibration": Calibration(error=0.01, bins=()),
        "tuning_curve": None,
        "settings": {},
        "weights": None,
    }
    return ArmFigures(name=name, **(figures | fields | changes))


def make_curve(points: dict[float, float]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(lmbda=lmbda, ppl=ppl) for lmbda, ppl in points.items())


def make_evaluation(*arms: ArmFigures, **changes: Any) -> Evaluation:
    """An evaluation of these arms, the base first."""
    fields = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": Machine(platform="Linux", cores=2),
        "model": "run/base",
        "corpus": "run/corpus",
        "tuning_split": "tuning",
        "test_split": "test",
        "extra_splits": (),
        "tokens": {"tuning": 700, "test": 900},
        "lambdas": (0.0, 0.5, 1.0),
        "settings": Settings(
            bootstrap_samples=200,
            bootstrap_block=50,
            block_size=256,
            stride=128,
            dtype="float32",
            device="cpu",
            threads=2,
        ),
        "subject": None,
        "reference": None,
        "recovered_share": None,
        "against": {},
        "wins": {},
        "breakdowns": (),
        "speeds": (),
        "samples": (),
    }
    return Evaluation(arms=arms, **(fields | changes))


def _make_keys(
    root: Path,
    vectors_ND: np.ndarray,
    values_N: np.ndarray,
    *,
    vocab_size: int = 50,
    block_size: int = 8,
    unit_positions: int = 96,
    scale: float = 0.5,
) -> Path:
    blocks = {unit_name(block.start): block for block in split_blocks(len(vectors_ND), unit_positions)}
    stage = open_stage(
        root,
        stage=KeysManifest.FORMAT,
        version=KeysManifest.VERSION,
        config=Flags(),
        inputs={"corpus": "0" * 64},
        world=World(),
    )

    def write(unit: str, writer: UnitWriter) -> None:
        rows = slice(*blocks[unit])
        name_of = partial(file_name, unit_positions=unit_positions, total=len(vectors_ND))
        writer.array(name_of("keys", rows.start), vectors_ND[rows])
        writer.array(name_of("values", rows.start), values_N[rows].astype(token_dtype(vocab_size)))

    stage.run_units(list(blocks), write)
    manifest = keys_manifest(
        codec=codec_manifest(
            name="int8" if vectors_ND.dtype == np.int8 else "raw",
            dim=vectors_ND.shape[1],
            scale=scale,
            raw_dtype=None if vectors_ND.dtype == np.int8 else "float16",
        ),
        num_positions=len(vectors_ND),
        unit_positions=unit_positions,
        vocab_size=vocab_size,
        block_size=block_size,
    )
    stage.complete(list(blocks), lambda: manifest)
    return root


@pytest.fixture(scope="session")
def make_keys() -> Callable[..., Path]:
    """make_keys(root, vectors [N, D] int8 or float16, values [N], …) writes a complete key directory."""
    return _make_keys


def _environment() -> dict[str, str]:
    """Of a process that trains: ours, without what a launcher has left there."""
    places = os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")])  # optional packages too
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": places, "PYTHONWARNINGS": "ignore"}
    return environment_without_launchers() | more


@pytest.fixture(scope="session")
def forked_training(forked_commands: Path) -> Iterator[ForkedTraining]:
    """forked_training(step, …) runs steps of trainings, see forked_training.py; their results, and what each
    said."""
    process = subprocess.Popen(
        [forked_commands / "python", _FORKED_TRAINING],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(*steps: dict[str, Any]) -> tuple[list[Any], list[str]]:
        stdin.write(json.dumps(steps) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, "the process that forks trainings has ended; its stderr says why"
        results, said = json.loads(line)
        return results, said

    yield run
    stdin.close()
    process.wait(60)


class Runs:
    """Short trainings below one directory: their jobs, their starts, and what they left.

    Args:
        root: each training is in a folder of its name there.
        forked_training: the fixture.
        flags: of every job; JSON values.
        stage: `train`, `train_base` or `train_baseline`.
    """

    def __init__(
        self, root: Path, forked_training: ForkedTraining, flags: Mapping[str, Any], *, stage: str = "train"
    ) -> None:
        self.root, self._run, self._flags, self._stage = root, forked_training, flags, stage

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def ds_config(self, stage: int, *, bf16: bool = False, own_adam: bool = False, **zero: Any) -> str:
        """A small DeepSpeed file.

        float32 unless told; with torch's AdamW unless `own_adam`, which matters where it is offloaded.
        """
        name = f"stage{stage}{'_bf16' if bf16 else ''}{'_adam' if own_adam else ''}{'_'.join(zero)}.json"
        whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        content = {
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": own_adam,
            "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": stage, **whole, **zero},
        }
        (self.root / name).write_text(json.dumps(content))
        return str(self.root / name)

    def job(self, name: str, ds_config: int | str, **changes: Any) -> dict[str, Any]:
        """The flags of one training; `ds_config` is a file, or a ZeRO stage. Paths become text."""
        path = self.ds_config(ds_config) if isinstance(ds_config, int) else ds_config
        job = {**self._flags, "ds_config": path, "output": self.root / name, **changes}
        return {key: str(value) if isinstance(value, Path) else value for key, value in job.items()}

    def start(self, name: str, ds_config: int | str, *, size: int = 1, **changes: Any) -> dict[str, Any]:
        """A step that starts a job with `size` ranks; `changes` may hold flags of `run_rank` too."""
        special = ("signal_at", "kill_at", "draw", "bytes_of_a_file", "bytes_of_weights")
        more = {key: changes.pop(key) for key in special if key in changes}
        job = self.job(name, ds_config, **changes)
        return {"kind": "start", "job": job, "size": size, "stage": self._stage, **more}

    def run(self, *steps: dict[str, Any]) -> tuple[list[Any], list[str]]:
        """The exit codes of each step's ranks, and what they said."""
        return self._run(*steps)

    def succeed(self, *steps: dict[str, Any]) -> list[str]:
        """What each step said; every rank of every step has to end well."""
        results, said = self._run(*steps)
        assert not any(code for codes in results for code in codes), "".join(said)
        return said

    def launch(self, launcher: Sequence[str | Path], *steps: dict[str, Any]) -> str:
        """Run steps one after another in the ranks of mpirun or torchrun; what they said.

        `launcher` has to start `python` of `forked_commands`.
        """
        (self.root / "steps.json").write_text(json.dumps(steps))
        result = subprocess.run(
            [*launcher, _FORKED_TRAINING, self.root / "steps.json"],
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    def train(self, name: str, ds_config: int | str, world: World | None = None, **changes: Any) -> None:
        """A training in this process, of a world of one unless told."""
        ranks = _ranks()
        job = self.job(name, ds_config, **changes)
        ranks.STAGES[self._stage].run(ranks.config_of(job, self._stage), world or World())

    def refuse(
        self, said: str, name: str, ds_config: int | str, world: World | None = None, **changes: Any
    ) -> None:
        """A training is refused with these words, and nothing is written."""
        with pytest.raises(UserError, match=said):
            self.train(name, ds_config, world, **changes)
        assert not (self.root / name).exists()

    # -- what they left

    def manifest(self, name: str) -> Any:
        return json.loads((self.root / name / "manifest.json").read_text())

    def lines(self, name: str, metric: str = "loss") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have this metric."""
        text = (self.root / name / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if metric in line]

    def losses(self, name: str) -> np.ndarray:
        """One of each step from the first on."""
        lines = self.lines(name)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return np.array([line["loss"] for line in lines])

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        path = "weights/model.safetensors" if self._stage == "train" else "model.safetensors"
        return load_file(self.root / name / path)

    def assert_same_weights(self, one: str, other: str) -> None:
        """Bit for bit."""
        first, second = self.weights(one), self.weights(other)
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name

    def perplexities(self, name: str) -> list[float]:
        """Of a language model's validations."""
        return [validation["perplexity"] for validation in self.manifest(name)["training"]["validations"]]

    def assert_same_bytes(self, one: str, other: str) -> None:
        """Of two language models' weights."""
        first, second = ((self.root / name / "model.safetensors").read_bytes() for name in (one, other))
        assert first == second

    def unfinish(self, name: str) -> None:
        """Take the result away; the checkpoints stay."""
        (self.root / name / "manifest.json").unlink()
        shutil.rmtree(self.root / name / "weights")
        shutil.rmtree(self.root / name / "done")

    def rewind(self, source: str, target: str, step: int) -> None:
        """A copy of a finished training, as if it had been killed after the checkpoint of `step`."""
        shutil.copytree(self.root / source, self.root / target)
        for path in (self.root / target / "checkpoints").glob("step-*"):
            if path.name > f"step-{step:08d}":
                shutil.rmtree(path)
        self.unfinish(target)


@functools.cache
def _ranks() -> Any:
    """forked_training.py as a module."""
    spec = importlib.util.spec_from_file_location("forked_training", _FORKED_TRAINING)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_runs(
    tmp_path_factory: pytest.TempPathFactory, forked_training: ForkedTraining
) -> Callable[..., Runs]:
    """make_runs(flags, stage="train") gives a `Runs` in a directory of its own."""

    def make(flags: Mapping[str, Any], *, stage: str = "train") -> Runs:
        return Runs(tmp_path_factory.mktemp("runs"), forked_training, flags, stage=stage)

    return make


def publish_memory(
    root: Path, shape: MemoryConfig, provenance: Provenance, *, seed: int, config: Any = None
) -> Path:
    """A random memory as `launch/train.py` leaves it."""
    torch.manual_seed(seed)
    weights = Memory(shape).state_dict()
    manifest = MemoryManifest(memory=shape.to_dict(), provenance=provenance, training=None)
    stage = open_stage(
        root,
        stage=MemoryManifest.FORMAT,
        version=MemoryManifest.VERSION,
        config=config or Flags(),
        inputs={},
        world=World(),
    )
    stage.run_units(
        ["weights"],
        lambda _, writer: write_weights(writer, weights, memory=manifest.memory, provenance=provenance),
    )
    stage.complete(["weights"], lambda: manifest)
    return root


def save_report(root: Path, evaluation: Evaluation, *, inputs: Mapping[str, str]) -> Path:
    """A report as `launch/evaluate.py` leaves it, without scores."""
    stage = open_stage(root, stage="report", version=1, config=Flags(), inputs=inputs, world=World())
    write_evaluation(root, evaluation)
    arms = tuple(arm.name for arm in evaluation.arms)
    manifest = ReportManifest(tokens=evaluation.tokens, arms=arms, settings=evaluation.settings)
    stage.complete([], lambda: manifest)
    return root


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON lines, with an empty one at the end, as editors leave it."""
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


def save_export(
    root: Path, base_dir: Path, corpus_dir: Path, *, lmbda: float, threshold: float | None = None
) -> Path:
    """A joint model of the toy base and a random memory, with the corpus's tokenizer."""
    torch.manual_seed(4)
    shape = MemoryConfig(
        input_size=16,
        hidden_size=16,
        intermediate_size=20,
        num_blocks=2,
        vocab_size=300,
        initializer_range=0.4,
    )
    tokenizer = AutoTokenizer.from_pretrained(corpus_dir / "tokenizer")
    joint = joined(
        GPT2LMHeadModel.from_pretrained(base_dir).eval(),
        Memory(shape),
        lmbda=lmbda,
        input_point=CapturePoint(layer=0),
        vocabulary_sha256=vocabulary_sha256(tokenizer),
    )
    joint.base_only_threshold = threshold
    joint.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def split_otherwise(model: Path) -> None:
    """Let the model's tokenizer have its words, and cut texts by another rule before it looks for them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.save_pretrained(model)

"""Fifth stage: keys' inputs + targets → a trained memory, under DeepSpeed.

    loss = alpha KL(kNN || memory) + (1 - alpha) CE

Batches come in an order that depends on the seed alone (formats/batches.py), so the number of ranks may change from one
start to the next, and a killed run continues from its newest whole checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import (
    AdamWSettings,
    Engine,
    StopRequest,
    build_engine,
    compute_dtype,
    micro_batches_per_step,
    resolve_ds_config,
    set_parameter,
    set_up_distributed,
)
from mlpmem_ds.engines.hidden_states import fingerprint_model
from mlpmem_ds.formats.batches import BatchReader, TrainingOrder
from mlpmem_ds.formats.checkpoint import MEMORY_STAGE, MEMORY_VERSION, list_checkpoints, write_weights
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import Targets, open_targets
from mlpmem_ds.models.backbone import load_base, output_head
from mlpmem_ds.models.memory import PRESETS, MemoryConfig
from mlpmem_ds.models.objective import SUM_NAMES, MemoryObjective
from mlpmem_ds.stages.training_loop import LoopSettings, Metrics, Schedule, learning_rate_at, run_steps

_logger = logging.getLogger(__name__)
_UNIT = "weights"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, on what, and how."""

    ds_config: Path = option("DeepSpeed configuration, one of ds_configs/")
    corpus: Path = option("corpus directory")
    targets: Path | None = option("target directory; may be left out with --alpha 0", None)
    keys: Path | None = option("key directory (default: `keys` beside --targets)", None)
    output: Path = option("training directory to write")
    model: str | None = option("base model, a directory or Hub name: needed for --head base", None, identity=False)
    preset: (
        Literal[
            "gelu-18x768",
            "gelu-36x1024",
            "gelu-54x1280",
            "swiglu-8x4096-11008",
            "swiglu-8x4096-14336",
            "1b",
            "3b",
            "7b",
            "13b",
        ]
        | None
    ) = option("a named size of memory, instead of the four flags below", None)
    num_blocks: int | None = option("residual blocks (default: 4)", None)
    hidden_size: int | None = option("width (default: the inputs')", None)
    intermediate_size: int | None = option("width inside a block (default: 4 x the width)", None)
    family: Literal["gelu", "swiglu"] | None = option("kind of block (default: gelu)", None)
    head: Literal["random", "base"] = option("start of the output head: random, or the base's own", "random")
    alpha: float = option("weight of KL(kNN || memory); 1 - alpha is that of the cross entropy", 0.5)
    ce_through: Literal["plain", "mixture"] = option(
        "cross entropy of the memory alone, or of its interpolation with the base", "plain"
    )
    mixture_lambda: float = option("weight of the memory in that interpolation", 0.25)
    epochs: float = option("passes over all positions", 5.0)
    batch_positions: int = option("positions in a step, over all ranks", 2048)
    micro_batch_positions: int = option(
        "most positions that a rank takes through the model at once", 8192, identity=False
    )
    learning_rate: float = option("peak of the learning rate", 2e-3)
    warmup_fraction: float = option("share of the steps that warm up", 0.05)
    schedule: Schedule = option("after the warm-up: cosine to a tenth, linear to 0, or constant", "cosine")
    weight_decay: float = option("of matrices, not of biases and norms", 0.1)
    gradient_clipping: float = option("norm at which gradients are clipped; 0 = never", 1.0)
    seed: int = option("seed of the initial weights and of the order", 0)
    shuffle_window_blocks: int = option(
        "blocks of positions that are shuffled together; each rank holds two such windows", 1024
    )
    save_every_steps: int = option("steps between checkpoints", 500, identity=False)
    keep_checkpoints: int = option("newest checkpoints kept", 2, identity=False)
    resume: Literal["auto", "never"] = option(
        "continue from the newest whole checkpoint, or discard the checkpoints and start anew", "auto", identity=False
    )
    log_every_steps: int = option("steps between log lines", 10, identity=False)

    def __post_init__(self) -> None:
        for name in (
            "batch_positions",
            "micro_batch_positions",
            "shuffle_window_blocks",
            "save_every_steps",
            "keep_checkpoints",
            "log_every_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("alpha", "warmup_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(self, name)}")
        if self.gradient_clipping < 0 or self.weight_decay < 0:
            raise UserError("--gradient-clipping and --weight-decay must not be negative")
        if not 0 < self.mixture_lambda <= 1:
            raise UserError(f"--mixture-lambda must lie in (0, 1], not {self.mixture_lambda}")
        if self.targets is None and (self.alpha > 0 or self.keys is None):
            raise UserError("--targets is needed (without it: --alpha 0 and --keys)")
        if self.head == "base" and self.model is None:
            raise UserError("--head base needs --model, the base whose output head is copied")
        shape = [
            name
            for name in ("num_blocks", "hidden_size", "intermediate_size", "family")
            if getattr(self, name) is not None
        ]
        if self.preset and shape:
            raise UserError(f"--preset {self.preset} fixes the shape: leave out --{shape[0].replace('_', '-')}")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The checked inputs."""

    corpus: CorpusSplit
    keys: Keys
    targets: Targets | None
    memory: MemoryConfig
    model_sha256: str | None

    @property
    def hashes(self) -> dict[str, str]:
        hashes = {"corpus": self.corpus.sha256, "keys": self.keys.sha256}
        if self.targets is not None:
            hashes["targets"] = self.targets.sha256
        return hashes


def run(config: Config, world: World) -> None:
    """Train, or continue, or say that it is complete; see formats/README.md for what is written."""
    inputs = _open_inputs(config)
    ds_config = resolve_ds_config(
        config.ds_config,
        batch=config.batch_positions,
        batch_flag="--batch-positions",
        world_size=world.size,
        max_micro_batch=config.micro_batch_positions,
        gradient_clipping=config.gradient_clipping,
    )
    num_steps = int(config.epochs * inputs.keys.num_positions) // config.batch_positions
    if num_steps < 1:
        raise UserError(
            f"--epochs {config.epochs:g} of {inputs.keys.num_positions:,} positions do not fill one batch of "
            f"--batch-positions {config.batch_positions:,}: choose a smaller batch or more epochs"
        )
    head = _base_head(config, inputs)
    directory = open_stage(
        config.output,
        stage=MEMORY_STAGE,
        version=MEMORY_VERSION,
        config=config,
        inputs=inputs.hashes,
        world=world,
        extra={
            **inputs.memory.to_dict(),
            "dtype": str(compute_dtype(ds_config)),
            "num_steps": num_steps,
            **({} if inputs.model_sha256 is None or config.head == "random" else {"head_of": inputs.model_sha256}),
        },
    )
    if directory.manifest_path.is_file() and directory.fault_of_unit(_UNIT) is None:
        _logger.info("complete: %s (%d steps)", config.output, num_steps)
        return
    if world.is_first:
        publish_json(config.output / "ds_config.json", ds_config)
        _logger.info(
            "%s parameters, %d steps of %d positions, ZeRO stage %d on %d ranks",
            f"{inputs.memory.num_parameters():,}",
            num_steps,
            config.batch_positions,
            ds_config.get("zero_optimization", {}).get("stage", 0),
            world.size,
        )
    set_up_distributed(world)
    _train(config, inputs, ds_config, num_steps, head, directory)


def _open_inputs(config: Config) -> _Inputs:
    corpus = open_corpus(config.corpus)
    targets = None if config.targets is None else open_targets(config.targets)
    keys = _open_keys(config, targets)
    if keys.corpus_sha256 != corpus.sha256:
        raise UserError(
            f"--keys {keys.root} were extracted from another corpus than --corpus {config.corpus}: give that "
            "corpus, or extract the keys again"
        )
    if keys.manifest["split"] != corpus.name:
        raise UserError(f"--keys {keys.root} are of split {keys.manifest['split']!r}: extract those of {corpus.name!r}")
    if keys.input_size == 0:
        raise UserError(f"--keys {keys.root} hold no memory inputs: extract them with --store-inputs")
    vocab_size = keys.manifest["vocab_size"]
    sizes = {
        "--corpus": corpus.vocab_size,
        **({} if targets is None else {"--targets": targets.manifest["vocab_size"]}),
    }
    for flag, size in sizes.items():
        if size != vocab_size:
            raise UserError(
                f"{flag} has a vocabulary of {size:,}, --keys {keys.root} one of {vocab_size:,}: they must "
                "come from one run; remake the later one"
            )
    if targets is not None and targets.manifest["num_positions"] != keys.num_positions:
        raise UserError(
            f"--targets {config.targets} have {targets.manifest['num_positions']:,} positions, the keys "
            f"{keys.num_positions:,}: write the targets again"
        )
    model_sha256 = None if config.model is None else fingerprint_model(config.model)
    if model_sha256 is not None and model_sha256 != keys.manifest["inputs"]["model"]:
        raise UserError(
            f"--model {config.model} is not the base that --keys {keys.root} were extracted with: give that one"
        )
    return _Inputs(
        corpus=corpus, keys=keys, targets=targets, memory=_memory_config(config, keys), model_sha256=model_sha256
    )


def _open_keys(config: Config, targets: Targets | None) -> Keys:
    """The keys that the targets were made from."""
    if config.keys is not None:
        keys, place = open_keys(config.keys), f"--keys {config.keys}"
    else:
        assert config.targets is not None
        beside = config.targets.resolve().parent / "keys"
        if not beside.is_dir():
            raise UserError(f"there is no directory `keys` beside --targets {config.targets}: give --keys")
        keys, place = open_keys(beside), str(beside)
    if targets is not None and targets.keys_sha256 != keys.sha256:
        raise UserError(
            f"{place} are not the keys that --targets {config.targets} were made from: give those with --keys, "
            "or write the targets again"
        )
    return keys


def _memory_config(config: Config, keys: Keys) -> MemoryConfig:
    # As many outputs as the base's head has, which may be padded beyond the tokenizer's entries: the two are mixed.
    vocab_size, input_size = keys.manifest["head_size"], keys.input_size
    if config.preset is not None:
        return dataclasses.replace(PRESETS[config.preset](vocab_size), input_size=input_size)
    hidden_size = config.hidden_size or input_size
    try:
        return MemoryConfig(
            input_size=input_size,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            family=config.family or "gelu",
            intermediate_size=4 * hidden_size if config.intermediate_size is None else config.intermediate_size,
            num_blocks=4 if config.num_blocks is None else config.num_blocks,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _base_head(config: Config, inputs: _Inputs) -> torch.Tensor | None:
    """The base's output head, where the memory's starts from it."""
    if config.head == "random":
        return None
    assert config.model is not None
    try:
        weight_VD = output_head(load_base(config.model, dtype=torch.float32, device="cpu"))[0]
    except ValueError as error:
        raise UserError(str(error)) from error
    wanted = (inputs.memory.vocab_size, inputs.memory.hidden_size)
    if tuple(weight_VD.shape) != wanted:
        raise UserError(
            f"--head base: the base's head is {tuple(weight_VD.shape)} (vocabulary, width), the memory's "
            f"{wanted}: leave out --hidden-size, or use --head random"
        )
    return weight_VD.detach().clone()


def _train(
    config: Config,
    inputs: _Inputs,
    ds_config: Mapping[str, Any],
    num_steps: int,
    head: torch.Tensor | None,
    directory: StageDirectory,
) -> None:
    world, checkpoints = directory.world, config.output / "checkpoints"
    mixture_lambda = config.mixture_lambda if config.ce_through == "mixture" else None

    def start_head(model: nn.Module) -> None:
        if head is not None:
            set_parameter(model.head.weight, head)  # type: ignore[union-attr, arg-type]

    engine = build_engine(
        partial(MemoryObjective, inputs.memory, alpha=config.alpha, mixture_lambda=mixture_lambda),
        config=ds_config,
        settings=AdamWSettings(weight_decay=config.weight_decay),
        seed=config.seed,
        world=world,
        prepare=start_head,
    )
    first = _first_step(config, engine, checkpoints, world)
    reader = BatchReader(
        inputs.keys,
        inputs.targets if config.alpha > 0 else None,
        TrainingOrder(
            num_positions=inputs.keys.num_positions,
            block_size=inputs.keys.manifest["block_size"],
            window_blocks=config.shuffle_window_blocks,
            seed=config.seed,
        ),
        batch_positions=config.batch_positions,
        rank=world.rank,
        size=world.size,
        num_micro_batches=micro_batches_per_step(ds_config),
        with_log_probabilities=mixture_lambda is not None,
    )
    provenance = _provenance(config, inputs, num_steps)
    fields = {"memory": inputs.memory.to_dict(), "provenance": provenance}
    progress = Progress((num_steps - first) * config.batch_positions, label="training", unit="positions", world=world)
    metrics = Metrics(config.output, world, first)
    stop_request = StopRequest(engine.device)

    def save(step: int) -> None:
        engine.save(checkpoints, step, fields=fields, values={"batches": step}, keep=config.keep_checkpoints)
        directory.log.write("checkpoint", step=step)

    done, stopped = run_steps(
        engine,
        _arguments(reader, engine, first, num_steps),
        first=first,
        stop=num_steps,
        settings=LoopSettings(
            rows_per_step=config.batch_positions,
            unit="positions",
            num_steps=num_steps,
            log_every=config.log_every_steps,
            save_every=config.save_every_steps,
            names=SUM_NAMES,
            learning_rate=partial(
                learning_rate_at,
                peak=config.learning_rate,
                num_steps=num_steps,
                warmup_steps=round(config.warmup_fraction * num_steps),
                schedule=config.schedule,
            ),
        ),
        save=save,
        stop_request=stop_request,
        progress=progress,
        metrics=metrics,
    )
    stop_request.close()
    metrics.close()
    progress.close()
    if stopped:
        directory.log.write("stopped", step=done)
        if world.is_first:
            _logger.info("stopped as asked and saved at step %d of %d: the same command continues", done, num_steps)
        return
    weights = engine.whole_weights()
    directory.run_units([_UNIT], lambda _, writer: _write(writer, weights, fields))
    if world.is_first:
        directory.finish([_UNIT], lambda: {**fields, "steps": num_steps, "weights_dtype": "float32"})
    engine.wait()


def _first_step(config: Config, engine: Engine, checkpoints: Path, world: World) -> int:
    """Resume as asked; the number of steps done."""
    if config.resume == "auto":
        saved = engine.resume(checkpoints)
        return 0 if saved is None else saved.step
    if world.is_first:
        for path in (*list_checkpoints(checkpoints), *checkpoints.glob("step-*.damaged")):
            _logger.warning("--resume never: discarding %s", path)
            shutil.rmtree(path)
    engine.wait()
    return 0


def _arguments(
    reader: BatchReader, engine: Engine, first: int, stop: int
) -> Iterator[tuple[list[tuple[Any, ...]], float]]:
    """Each step's micro-batches as the objective takes them, on the engine's device and in its dtype."""
    for micro_batches, seconds in reader.stream(first, stop):
        yield (
            [
                (part.inputs_NI.to(engine.device, engine.dtype), part.targets.to(engine.device))
                for part in micro_batches
            ],
            seconds,
        )


def _write(writer: UnitWriter, weights: Mapping[str, torch.Tensor], fields: Mapping[str, Any]) -> dict[str, Any]:
    write_weights(writer, weights, memory=fields["memory"], provenance=fields["provenance"])
    return {"parameters": sum(tensor.numel() for tensor in weights.values())}


def _provenance(config: Config, inputs: _Inputs, num_steps: int) -> dict[str, Any]:
    """What the memory was made from and for: plain values."""
    manifest = inputs.keys.manifest
    return json.loads(
        json.dumps(
            {
                "base": manifest["inputs"]["model"],
                **inputs.hashes,
                "vocabulary_sha256": inputs.corpus.vocabulary_sha256,
                "key_layer": manifest["key_layer"],
                "input_layer": manifest["input_layer"],
                "key_point": manifest["key_point"],
                "alpha": config.alpha,
                "ce_through": config.ce_through,
                "mixture_lambda": config.mixture_lambda if config.ce_through == "mixture" else None,
                "head": config.head,
                "epochs": config.epochs,
                "batch_positions": config.batch_positions,
                "steps": num_steps,
                "seed": config.seed,
                "parameters": inputs.memory.num_parameters(),
            }
        )
    )

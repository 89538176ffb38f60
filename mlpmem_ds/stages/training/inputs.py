"""What `train` is given: the corpus, keys, targets and base behind them, checked against each other.

Place in the pipeline: the start of `train`; everything is refused here, before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import set_up_distributed
from mlpmem_ds.engines.hidden_states import TransformersSource, check_source_reads, fingerprint_model
from mlpmem_ds.engines.sharded_base import ShardedSource
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.targets import Targets, open_targets
from mlpmem_ds.models.backbone import CapturePoint, load_base, output_head
from mlpmem_ds.models.memory import PRESETS, MemoryConfig
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.initial_memory import InitialMemory, check_fits, open_initial_memory
from mlpmem_ds.stages.training.metrics import require_wandb

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """The checked inputs."""

    corpus: CorpusSplit
    keys: Keys
    targets: Targets | None
    memory: MemoryConfig
    model_sha256: str | None
    source: TransformersSource | None
    """the base; None where nothing needs it"""
    tuning: CorpusSplit | None
    """what is validated on; None = no validation"""
    initial: InitialMemory | None = None
    """whose weights the training starts from; None = random ones"""

    @property
    def is_online(self) -> bool:
        """Whether the base computes the inputs during the training."""
        return self.keys.input_size == 0

    @cached_property
    def point(self) -> CapturePoint:
        """Where the memory reads."""
        return CapturePoint(layer=self.keys.manifest["input_layer"], point=self.keys.input_point)

    @property
    def hashes(self) -> dict[str, str]:
        hashes = {"corpus": self.corpus.sha256, "keys": self.keys.sha256}
        if self.targets is not None:
            hashes["targets"] = self.targets.sha256
        if self.initial is not None:
            hashes["init_from"] = self.initial.sha256
        return hashes


def open_inputs(config: Config, world: World) -> TrainingInputs:
    """Open everything and check that it belongs together. A base that is to be cut over the ranks starts
    their group.

    Raises:
        UserError: with what does not fit, and the remedy.
    """
    corpus = open_corpus(config.corpus)
    targets = None if config.targets is None else open_targets(config.targets)
    keys = _open_keys(config, targets)
    if keys.corpus_sha256 != corpus.sha256:
        raise UserError(
            f"--keys {keys.root} were extracted from another corpus than --corpus {config.corpus}: give that "
            "corpus, or extract the keys again"
        )
    if keys.manifest["split"] != corpus.name:
        raise UserError(
            f"--keys {keys.root} are of split {keys.manifest['split']!r}: extract those of {corpus.name!r}"
        )
    if config.wandb_project is not None:
        require_wandb()
    if keys.input_size == 0 and config.model is None:
        raise UserError(
            f"--keys {keys.root} hold no memory inputs: give --model, the base, to compute them during the"
            " training, or extract the keys again with inputs"
        )
    if keys.input_size == 0 and config.order == "positions":
        raise UserError(
            f"--keys {keys.root} hold no memory inputs, and computing them goes block by block: leave out"
            " --order positions"
        )
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
    if model_sha256 is not None and model_sha256 != keys.base_sha256:
        raise UserError(
            f"--model {config.model} is not the base that gave the inputs of --keys {keys.root}: give that"
            " one (the --input-model of extract_keys where it had one)"
        )
    tuning = _tuning_split(config)
    source = None
    if config.model is not None and (keys.input_size == 0 or tuning is not None):
        source = _open_base(config.model, keys, world, is_sharded=config.base_sharding == "zero3")
        check_source_reads(source, corpus, config.model)
    elif config.base_sharding != "none":
        raise UserError(
            f"--base-sharding {config.base_sharding} cuts the base that runs beside the training, and none"
            f" does here (--keys {keys.root} store the inputs, and nothing is validated): leave it out, or"
            " give --model, a corpus with a tuning split and a --validate-every other than 0"
        )
    input_size = keys.input_size or (0 if source is None else source.width)
    initial = None if config.init_from is None else open_initial_memory(config.init_from)
    return TrainingInputs(
        corpus=corpus,
        keys=keys,
        targets=targets,
        memory=(
            _memory_config(config, keys, input_size)
            if initial is None
            else _shape_of(initial, config, keys, input_size, corpus.vocabulary_sha256)
        ),
        model_sha256=model_sha256,
        source=source,
        tuning=tuning,
        initial=initial,
    )


def _open_base(model: str, keys: Keys, world: World, *, is_sharded: bool) -> TransformersSource:
    """The base as `extract_keys` ran it."""
    flags = keys.manifest.get("config", {})
    settings = {
        "dtype": flags.get("dtype", "auto"),
        "attention": "eager" if flags.get("attention") == "eager" else "sdpa",  # some models have no other
        "local_rank": world.local_rank,
        "layers_path": keys.manifest.get("input_layers_path"),
    }
    if not is_sharded or world.size == 1:
        if is_sharded:
            _logger.warning("--base-sharding zero3 changes nothing on one rank, which holds the whole base")
        return TransformersSource(model, **settings)
    set_up_distributed(world)
    source = ShardedSource(model, **settings)
    _logger.info(
        "the base is cut over %d ranks: this one holds %s of its %s numbers between forwards",
        world.size,
        f"{source.numbers_held():,}",
        f"{source.numbers():,}",
    )
    return source


def _tuning_split(config: Config) -> CorpusSplit | None:
    """What is validated on, if anything is."""
    if config.validate_every == 0 or config.model is None:
        return None
    if num_tokens_of_splits(config.corpus).get("tuning", 0) > 1:
        return open_corpus(config.corpus, "tuning")
    if config.validate_every or config.early_stopping_patience or config.select == "best":
        raise UserError(
            f"--corpus {config.corpus} has no tuning split to validate on: prepare it with --tuning-fraction,"
            " or leave out --validate-every, --early-stopping-patience and --select best"
        )
    return None


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
            f"{place} are not the keys that --targets {config.targets} were made from: give those with"
            " --keys, or write the targets again"
        )
    return keys


def _memory_config(config: Config, keys: Keys, input_size: int) -> MemoryConfig:
    # As many outputs as the base's head has, which may be padded beyond the tokenizer's entries: the two are
    # mixed.
    vocab_size = keys.manifest["head_size"]
    if config.preset is not None:
        return dataclasses.replace(PRESETS[config.preset](vocab_size), input_size=input_size)
    hidden_size = config.hidden_size or input_size
    try:
        return MemoryConfig(
            input_size=input_size,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            family=config.family or "gelu",
            intermediate_size=(
                4 * hidden_size if config.intermediate_size is None else config.intermediate_size
            ),
            num_blocks=4 if config.num_blocks is None else config.num_blocks,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _shape_of(
    initial: InitialMemory, config: Config, keys: Keys, input_size: int, vocabulary_sha256: str
) -> MemoryConfig:
    """The shape of the memory that the training starts from; the flags may repeat it."""
    asked = {
        name: getattr(config, name)
        for name in ("num_blocks", "hidden_size", "intermediate_size", "family")
        if getattr(config, name) is not None
    }
    if config.preset is not None:
        named = PRESETS[config.preset](initial.memory.vocab_size)
        asked = {
            name: getattr(named, name)
            for name in ("num_blocks", "hidden_size", "intermediate_size", "family")
        }
    wanted: dict[str, tuple[str, object]] = {
        "input_size": (f"the inputs of --keys {keys.root} have", input_size),
        "vocab_size": ("the base's output head has", keys.manifest["head_size"]),
        **{
            name: (f"--{'preset' if config.preset else name.replace('_', '-')} asks for", value)
            for name, value in asked.items()
        },
    }
    check_fits(initial, wanted=wanted, vocabulary_sha256=vocabulary_sha256)
    return initial.memory


def base_head(config: Config, inputs: TrainingInputs) -> torch.Tensor | None:
    """The base's output head, float32 [V, D], where the memory's starts from it."""
    if config.head == "random":
        return None
    assert config.model is not None
    if (
        inputs.source is not None and inputs.source.is_collective
    ):  # it may be too large to be loaded whole by each rank
        weight_VD = inputs.source.head_weight()
    else:
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


def provenance_of(config: Config, inputs: TrainingInputs, num_steps: int) -> dict[str, Any]:
    """What the memory was made from and for: plain values."""
    manifest = inputs.keys.manifest
    return json.loads(
        json.dumps(
            {
                "base": inputs.keys.base_sha256,
                "key_model": inputs.keys.model_sha256,
                **inputs.hashes,
                "vocabulary_sha256": inputs.corpus.vocabulary_sha256,
                "key_layer": manifest["key_layer"],
                "input_layer": manifest["input_layer"],
                "input_point": inputs.keys.input_point,
                "key_point": manifest["key_point"],
                **({"input_layers_path": path} if (path := manifest.get("input_layers_path")) else {}),
                "alpha": config.alpha,
                "ce_through": config.ce_through,
                "mixture_lambda": config.mixture_lambda if config.ce_through == "mixture" else None,
                "head": config.head if inputs.initial is None else "init_from",
                "epochs": config.epochs,
                "batch_positions": config.batch_positions,
                "steps": num_steps,
                "seed": config.seed,
                "parameters": inputs.memory.num_parameters(),
            }
        )
    )

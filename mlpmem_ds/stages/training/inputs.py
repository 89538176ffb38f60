"""Part of `train`: its inputs, opened and checked against each other.

Everything that one rank can see alone is refused at this point, before anything is written and before the
ranks meet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.once import shared_place
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.formats.past_inputs import KeysWithPast
from mlpmem_ds.formats.targets import Targets, open_targets
from mlpmem_ds.formats.trained_models import Provenance
from mlpmem_ds.formats.training_windows import StoredKeys
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.initial_memory import InitialMemory, open_initial_memory
from mlpmem_ds.stages.training.metrics import require_wandb
from mlpmem_ds.stages.training.recipes import recipe_changes


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """The checked inputs."""

    corpus: CorpusSplit
    keys: Keys
    targets: Targets | None
    model_sha256: str | None
    """of the base; None where none was given"""
    tuning: CorpusSplit | None
    """what is validated on; None = no validation"""
    initial: InitialMemory | None
    """whose weights the training starts from; None = random ones"""
    window: int = 1
    """positions whose inputs the memory reads at once"""
    initial_sha256: str | None = None
    """of them; the ranks work it out together, after they have met"""
    objective_reason: str | None = None
    """why the objective was chosen; None where the flags say it"""

    @property
    def is_online(self) -> bool:
        """Whether the base computes the inputs during the training."""
        return self.keys.input_size == 0

    @property
    def needs_base(self) -> bool:
        """Whether the base runs next to the training."""
        return self.is_online or self.tuning is not None

    @cached_property
    def point(self) -> CapturePoint:
        """Where the memory reads."""
        return replace(CapturePoint.of(self.keys.manifest), past=self.window - 1)

    @property
    def stored_keys(self) -> StoredKeys:
        """The keys as a training reads them."""
        if self.window == 1:
            return self.keys
        return KeysWithPast(keys=self.keys, windows=self.corpus.windows(), past=self.window - 1)

    @property
    def hashes(self) -> dict[str, str]:
        hashes = {"corpus": self.corpus.sha256, "keys": self.keys.sha256}
        if self.targets is not None:
            hashes["targets"] = self.targets.sha256
        if self.initial_sha256 is not None:
            hashes["init_from"] = self.initial_sha256
        return hashes


def open_inputs(config: Config, world: World) -> TrainingInputs:
    """Open everything and check that it belongs together.

    Raises:
        UserError: with what does not fit, and the remedy.
    """
    corpus = open_corpus(config.corpus)
    targets = None
    if config.targets is not None:
        targets = open_targets(config.targets, has_shards=config.targets_url is None)
    keys = _open_keys(config, targets)
    _check_one_corpus(config, corpus, keys, targets)
    if config.wandb_project is not None:
        require_wandb()
    if keys.input_size == 0:
        _check_online(config, keys)
    inputs = TrainingInputs(
        corpus=corpus,
        keys=keys,
        targets=targets,
        model_sha256=_check_base(config, keys, world),
        tuning=_tuning_split(config),
        window=config.window,
        initial=None if config.init_from is None else open_initial_memory(config.init_from),
    )
    if config.window > 1 and corpus.has_answers:
        raise UserError(
            f"--window {config.window} needs keys of all positions, and those of a corpus with answers are of"
            " the answers alone: leave it out"
        )
    if config.base_sharding != "none" and not inputs.needs_base:
        raise UserError(
            f"--base-sharding {config.base_sharding} cuts the base that runs next to the training, and none"
            f" does here (--keys {keys.root} store the inputs, and nothing is validated): leave it out, or"
            " give --model, a corpus with a tuning split and a --validate-every other than none"
        )
    return inputs


def verify_files(directory: StageDirectory, inputs: TrainingInputs, *, with_log_probabilities: bool) -> None:
    """Compare what the steps read with its checksums, once, each rank a share; samples of targets carry
    checksums of their own, and are compared when they are read.

    Raises:
        DamagedDataError: a file does not have its checksum.
    """
    arrays = ["values", *([] if inputs.is_online else ["inputs", "input_scales"]), "positions"]
    arrays += ["log_probabilities"] if with_log_probabilities else []
    verify_inputs(directory, inputs.keys, inputs.keys.array_files(*arrays), label="keys")
    if inputs.is_online:
        verify_inputs(directory, inputs.corpus, inputs.corpus.stream_files, label="corpus")
    if inputs.tuning is not None:
        verify_inputs(directory, inputs.tuning, inputs.tuning.stream_files, label="tuning")


def check_log_probabilities(config: Config, keys: Keys) -> None:
    """The keys store the base's log-probabilities, which the objective reads.

    Raises:
        UserError: they do not; those of an imported datastore never do.
    """
    if not keys.has_log_probabilities:
        raise UserError(
            f"--objective {config.objective} with --ce-through {config.ce_through} reads what the base gives"
            f" each label, and --keys {keys.root} hold no log-probabilities of the base (an imported"
            " datastore has none): give --ce-through plain with --objective imitation or joined, or keys of"
            " extract_keys"
        )


def check_loader(config: Config, inputs: TrainingInputs, world: World) -> None:
    """The shards can be streamed by so many ranks.

    Raises:
        UserError: there are too few of them, or the inputs come from a base that the ranks run together.
    """
    if config.loader == "stored":
        return
    assert inputs.targets is not None
    num_shards = len(inputs.targets.manifest.shards)
    if num_shards < world.size * config.open_shards:
        raise UserError(
            f"--loader webdataset deals whole shards: {num_shards} are too few for {world.size} ranks with"
            f" --open-shards {config.open_shards} each; choose fewer, write the targets with a smaller"
            " --shard-positions, or use --loader stored"
        )
    if inputs.is_online and config.base_sharding != "none":
        raise UserError(
            f"--loader webdataset cannot compute inputs with a base that all ranks run together"
            f" (--base-sharding {config.base_sharding}): use --loader stored, or store the inputs"
        )


def _open_keys(config: Config, targets: Targets | None) -> Keys:
    """The keys that the targets were made from."""
    if config.keys is not None:
        keys, name = open_keys(config.keys), f"--keys {config.keys}"
    else:
        assert config.targets is not None
        default = config.targets.resolve().parent / "keys"
        if not default.is_dir():
            raise UserError(f"there is no directory `keys` next to --targets {config.targets}: give --keys")
        keys, name = open_keys(default), str(default)
    if targets is not None and targets.keys_sha256 != keys.sha256:
        raise UserError(
            f"{name} are not the keys that --targets {config.targets} were made from: give those with"
            " --keys, or write the targets again"
        )
    return keys


def _check_one_corpus(config: Config, corpus: CorpusSplit, keys: Keys, targets: Targets | None) -> None:
    """Keys and targets are of this corpus, of one split, one vocabulary and as many positions."""
    if keys.corpus_sha256 != corpus.sha256:
        raise UserError(
            f"--keys {keys.root} were extracted from another corpus than --corpus {config.corpus}: give that "
            "corpus, or extract the keys again"
        )
    if keys.manifest.split != corpus.name:
        raise UserError(
            f"--keys {keys.root} are of split {keys.manifest.split!r}: extract those of {corpus.name!r}"
        )
    vocab_size = keys.manifest.vocab_size
    sizes = {
        "--corpus": corpus.vocab_size,
        **({} if targets is None else {"--targets": targets.manifest.vocab_size}),
    }
    for flag, size in sizes.items():
        if size != vocab_size:
            raise UserError(
                f"{flag} has a vocabulary of {size:,}, --keys {keys.root} one of {vocab_size:,}: they must "
                "come from one run; remake the later one"
            )
    if targets is not None and targets.manifest.num_positions != keys.num_positions:
        raise UserError(
            f"--targets {config.targets} have {targets.manifest.num_positions:,} positions, the keys "
            f"{keys.num_positions:,}: write the targets again"
        )


def _check_online(config: Config, keys: Keys) -> None:
    """The inputs can be computed during the training."""
    if keys.manifest.counts == "answers":
        raise UserError(
            f"--keys {keys.root} are of answers alone and hold no memory inputs, and computing them goes over"
            " whole blocks of the text: extract the keys again with --input-codec bf16 or int8"
        )
    if config.model is None:
        raise UserError(
            f"--keys {keys.root} hold no memory inputs: give --model, the base, to compute them during the"
            " training, or extract the keys again with inputs"
        )
    if config.order == "positions":
        raise UserError(
            f"--keys {keys.root} hold no memory inputs, and computing them goes block by block: leave out"
            " --order positions"
        )


def _check_base(config: Config, keys: Keys, world: World) -> str | None:
    """The fingerprint of --model, which is the base that gave the keys' inputs."""
    if config.model is None:
        return None
    model_sha256 = fingerprint_model(config.model, shared=shared_place(config.output, world))
    if model_sha256 != keys.base_sha256:
        raise UserError(
            f"--model {config.model} is not the base that gave the inputs of --keys {keys.root}: give that"
            " one (the --input-model of extract_keys where it had one)"
        )
    return model_sha256


def _tuning_split(config: Config) -> CorpusSplit | None:
    """What is validated on, if anything is."""
    if config.validate_every is None or config.model is None:
        return None
    if num_tokens_of_splits(config.corpus).get("tuning", 0) > 1:
        return open_corpus(config.corpus, "tuning")
    if config.asks_for_validation:
        raise UserError(
            f"--corpus {config.corpus} has no tuning split to validate on: prepare it with --tuning-fraction,"
            " or leave out --validate-every, --early-stopping-patience and --select best"
        )
    return None


def provenance_of(
    config: Config, inputs: TrainingInputs, memory: MemoryConfig, *, num_steps: int
) -> Provenance:
    """What the memory is made from and for."""
    manifest = inputs.keys.manifest
    return Provenance(
        base=inputs.keys.base_sha256,
        key_model=inputs.keys.model_sha256,
        corpus=inputs.hashes["corpus"],
        keys=inputs.hashes["keys"],
        targets=inputs.hashes.get("targets"),
        init_from=inputs.hashes.get("init_from"),
        vocabulary_sha256=inputs.corpus.vocabulary_sha256,
        key_layer=manifest.key_layer,
        input_layer=manifest.input_layer,
        input_point=manifest.input_point,
        input_earlier_layers=manifest.input_earlier_layers,
        key_point=manifest.key_point,
        begin_of_window_ids=manifest.begin_of_window_ids,
        input_layers_path=manifest.input_layers_path,
        objective=config.objective,
        objective_reason=inputs.objective_reason,
        recipe=config.recipe,
        recipe_changes=recipe_changes(config) or None,
        control=config.control,
        alpha=config.alpha,
        ce_through=config.ce_through,
        mixture_lambda=config.mixture_lambda if config.ce_through == "mixture" else None,
        joined_lambda=config.joined_lambda if config.objective == "joined" else None,
        start=config.start if inputs.initial is None else "init_from",
        head=config.head or config.start if inputs.initial is None else "init_from",
        epochs=config.epochs,
        batch_positions=config.batch_positions,
        steps=num_steps,
        seed=config.seed,
        parameters=memory.num_parameters(),
    )

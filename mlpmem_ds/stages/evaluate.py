"""Last stage: the base, the retriever, the memory and the controls, side by side on text that none of them was trained on.

A unit is a block of positions of one split: one pass of the base over it serves every arm that stands on that base, and
each arm leaves one file of log-probabilities. A control that is a model of its own has its own units. All choices and
figures come afterwards from those files (`report`), so that another grid of λ costs a second and no forward pass.

n positions of a unit, K neighbours, D width of a state, E size of a stored key, T temperatures.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from mlpmem_ds.core.blocks import Block, hash_fraction, split_blocks
from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_bytes, publish_json, read_json
from mlpmem_ds.core.log import Progress, read_events
from mlpmem_ds.core.stage_directory import StageDirectory, UnitWriter, open_stage, read_manifest
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import (
    StateSource,
    TransformersSource,
    check_source_reads,
    fingerprint_model,
    resolve_point,
    scan_positions,
)
from mlpmem_ds.formats.checkpoint import read_weights
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.index_directory import IndexDirectory, open_index
from mlpmem_ds.formats.keys import Keys, encode, open_keys, unit_name
from mlpmem_ds.maths.interpolation import label_log_probabilities
from mlpmem_ds.maths.knn import Neighbours, exact_neighbours
from mlpmem_ds.maths.targets import knn_probability, neighbour_weights
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.stages.extract_keys import Codec, read_codec
from mlpmem_ds.stages.report import (
    BASE,
    KNN_EXACT,
    KNN_IVFPQ,
    MEMORY,
    Arm,
    Protocol,
    plot_costs,
    plot_lambda_curves,
    render_report,
    render_table,
    summarise,
)

_logger = logging.getLogger(__name__)
FORMAT, VERSION = "report", 1
TEMPERATURE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_DEFAULT_K = 256
_RESCORE_ELEMENTS = 1 << 24  # numbers of gathered keys at hand
_RESERVED_NAMES = ("base", "memory", "knn_exact", "knn_ivfpq")


def lambda_grid(text: str) -> tuple[float, ...]:
    """`0:1:0.05` → 0, 0.05, …, 1.

    Raises:
        UserError: not three numbers, or values outside [0, 1].
    """
    try:
        first, last, step = (float(word) for word in text.split(":"))
        if step <= 0:
            raise ValueError
    except ValueError as error:
        raise UserError(f"--lambdas {text}: give first:last:step with a step above 0, such as 0:1:0.05") from error
    if not 0 <= first <= last <= 1:
        raise UserError(f"--lambdas {text}: an interpolation weight lies between 0 and 1, such as 0:1:0.05")
    return tuple(round(first + step * number, 12) for number in range(int((last - first) / step + 1e-9) + 1))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared, and on which text."""

    model: str = option("base language model: a directory or Hub name", identity=False)
    corpus: Path = option("corpus directory with the text to predict")
    output: Path = option("report directory to write")
    memory: Path | None = option("trained memory: an output of launch/train.py or an exported model", None)
    keys: Path | None = option("key directory: adds the arm base+knn_exact", None)
    index: Path | None = option("index of those keys: adds the arm base+knn_ivfpq", None)
    targets: Path | None = option("targets of those keys: their temperature and k are taken", None)
    control: tuple[str, ...] = option(
        "further arms: a memory (arm base+NAME) or a language model of its own (arm NAME)",
        (),
        identity=False,
        metavar="NAME=DIR",
    )
    exact: bool = option("search all the keys as well; its cost grows with positions times keys", True)
    tuning_split: str = option("split on which λ and the kNN temperature are chosen", "tuning")
    test_split: str = option("split that is reported", "test")
    extra_splits: tuple[str, ...] = option("further test sets, where the corpus has them", ("heldout",))
    k: int | None = option("neighbours (default: the targets', else 256)", None, identity=False)
    temperature: float | None = option(
        "kNN temperature in squared key units (default: the targets'); 1/4 to 4 times it are tried", None, identity=False
    )
    nprobe: int = option("lists that base+knn_ivfpq probes", 32)
    lambdas: str = option("values of λ to choose from, first:last:step", "0:1:0.05", identity=False)
    bootstrap_samples: int = option("resamples for the 95 % intervals", 2000, identity=False)
    bootstrap_block: int = option("positions in a block of the bootstrap", 256, identity=False)
    unit_positions: int = option("positions in a unit of work", 8192)
    batch_windows: int = option("windows that the base reads at once", 16, identity=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "of the forward passes; auto = bfloat16 on a GPU, float32 on a CPU", "auto", identity=False
    )
    device: str = option("auto, cpu, cuda or cuda:N", "auto", identity=False)
    attention: str = option("attention implementation: sdpa, eager or flash_attention_2", "sdpa")

    def __post_init__(self) -> None:
        for name in ("nprobe", "bootstrap_block", "unit_positions", "batch_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.bootstrap_samples < 100:
            raise UserError(f"--bootstrap-samples {self.bootstrap_samples}: a 95 % interval needs at least 100")
        if self.k is not None and self.k < 1:
            raise UserError(f"--k {self.k} must be at least 1")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature} must be a number above 0")
        lambda_grid(self.lambdas)
        splits = (self.tuning_split, self.test_split, *self.extra_splits)
        if len(set(splits)) != len(splits):
            raise UserError(f"the splits {', '.join(splits)} must differ: nothing is tested on the text that λ is chosen on")
        if self.index is not None and self.keys is None:
            raise UserError("--index needs --keys, the directory that it was built from: found distances are rescored from it")
        _control_directories(self.control)


def _control_directories(controls: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR words → name and directory."""
    directories: dict[str, Path] = {}
    for word in controls:
        name, sign, directory = word.partition("=")
        if not sign or not directory or not re.fullmatch(r"\w+", name):
            raise UserError(f"--control {word}: give NAME=DIR with a name of letters, digits and underscores")
        if name in directories or name in _RESERVED_NAMES:
            raise UserError(f"--control {word}: the name {name} is taken; choose another")
        directories[name] = Path(directory)
    return directories


@dataclass(frozen=True, kw_only=True)
class _Split:
    """What is scored as one: all positions of a stream, or those of half its documents."""

    name: str
    corpus: CorpusSplit
    positions: np.ndarray | None
    num_bytes: int

    @property
    def num_positions(self) -> int:
        return self.corpus.num_positions if self.positions is None else len(self.positions)

    def take(self, scores_N: np.ndarray) -> np.ndarray:
        """This split's rows of its stream's scores."""
        return scores_N if self.positions is None else scores_N[self.positions]


@dataclass(frozen=True, kw_only=True)
class _MemoryArm:
    """A memory, checked to belong to this base and vocabulary."""

    arm: str
    root: Path
    sha256: str
    memory: Memory
    point: CapturePoint
    provenance: Mapping[str, Any]
    bytes: int
    is_training: bool


@dataclass(frozen=True, kw_only=True)
class _ModelArm:
    """A language model of its own: a control that replaces the base."""

    arm: str
    path: str
    sha256: str
    source: TransformersSource


@dataclass(frozen=True, kw_only=True)
class _Datastore:
    """The keys, and the index where one was given; arrays are read when first needed and stay in memory."""

    keys: Keys
    index: IndexDirectory | None
    k: int
    nprobe: int
    temperature: float
    exact: bool
    point: CapturePoint

    @property
    def temperatures(self) -> tuple[float, ...]:
        return tuple(self.temperature * factor for factor in TEMPERATURE_FACTORS)

    @property
    def arms(self) -> list[str]:
        return [KNN_EXACT] * self.exact + [KNN_IVFPQ] * (self.index is not None)

    @cached_property
    def stored_NE(self) -> np.ndarray:
        return self.keys.read("keys")

    @cached_property
    def values_N(self) -> np.ndarray:
        return self.keys.read("values").astype(np.int64)

    @cached_property
    def codec(self) -> Codec:
        if self.keys.codec == "raw":
            return Codec(mean_D=None, rotation_DE=None, scale=1.0)
        return read_codec(self.keys.root)

    @cached_property
    def shards(self) -> list[Any]:
        from mlpmem_ds.engines import faiss as engine

        return [] if self.index is None else [engine.read_index(path) for path in self.index.shard_paths]

    def encode(self, states_nD: np.ndarray) -> np.ndarray:
        """States as the stored keys are: int8 codes, or float16."""
        if self.codec.mean_D is None or self.codec.rotation_DE is None:
            return states_nD.astype(np.float16)
        return encode(states_nD, self.codec.mean_D, self.codec.rotation_DE, self.codec.scale)[0]

    def search(self, arm: str, queries_nE: np.ndarray) -> Neighbours:
        if arm == KNN_EXACT:
            return exact_neighbours(queries_nE, self.stored_NE, self.k, exclusion=None)
        from mlpmem_ds.engines import faiss as engine

        _, ids_nK = engine.search(self.shards, queries_nE, self.k, self.nprobe)
        return Neighbours(ids_QK=ids_nK, distances_QK=rescore(queries_nE, ids_nK, self.stored_NE))

    def log_probabilities(self, neighbours: Neighbours, values_n: np.ndarray) -> np.ndarray:
        """log p_kNN(value) at each temperature, float32 [n, T]; -inf where no neighbour carries the value."""
        valid_nK = neighbours.ids_QK >= 0
        values_nK = np.where(valid_nK, self.values_N[neighbours.ids_QK], -1)
        squared_nK = np.where(valid_nK, neighbours.distances_QK, 0).astype(np.float64) * self.codec.scale**2
        columns = [
            knn_probability(neighbour_weights(squared_nK, temperature, valid_nK), values_nK, values_n)
            for temperature in self.temperatures
        ]
        with np.errstate(divide="ignore"):
            return np.log(np.stack(columns, axis=1)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Everything that the evaluation reads, opened and checked."""

    splits: Mapping[str, _Split]  # in the order tuning, test, extra
    source: TransformersSource
    base_sha256: str
    datastore: _Datastore | None
    memories: Sequence[_MemoryArm]
    models: Sequence[_ModelArm]
    seconds: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def streams(self) -> dict[str, CorpusSplit]:
        return {split.corpus.name: split.corpus for split in self.splits.values()}

    @property
    def base_arms(self) -> list[str]:
        """The arms that one pass of the base gives, itself first."""
        kinds = [] if self.datastore is None else self.datastore.arms
        return [BASE, *kinds, *(memory.arm for memory in self.memories)]

    @property
    def arms(self) -> list[str]:
        return [*self.base_arms, *(model.arm for model in self.models)]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A block of a stream, for the base and all that stands on it (model None) or for a model of its own."""

    name: str
    stream: str
    block: Block
    model: _ModelArm | None

    def file(self, arm: str) -> str:
        return f"scores/{self.stream}-{arm}-{unit_name(self.block.start)}.npy"


def run(config: Config, world: World) -> str | None:
    """Score what is missing; the rank that completes the last unit writes the report and returns the table as text."""
    inputs = _open_inputs(config)
    directory = open_stage(
        config.output, stage=FORMAT, version=VERSION, config=config, world=world, inputs=_hashes(inputs),
        extra=_resolved(inputs),
    )
    units = _list_units(config, inputs)
    progress = Progress(sum(unit.block.size for unit in units.values()), label="evaluation", unit="positions", world=world)

    def compute(name: str, writer: UnitWriter) -> dict[str, Any]:
        unit = units[name]
        score = _score_base_unit if unit.model is None else _score_model_unit
        summary = score(config, inputs, unit, writer)
        progress.advance(unit.block.size)
        return summary

    directory.run_units(list(units), compute)
    progress.close()
    tables: list[str] = []

    def describe() -> dict[str, Any]:
        evaluation = _evaluate(config, inputs, directory, units)
        _write_report(config.output, evaluation)
        tables.append(render_table(evaluation))
        return {name: evaluation[name] for name in ("tokens", "settings")} | {"arms": inputs.arms}

    directory.finish(list(units), describe)
    return tables[0] if tables else None


def _open_inputs(config: Config) -> _Inputs:
    """Open and check everything; nothing has been written yet.

    Raises:
        UserError: an input is missing, or does not belong to this base, corpus or datastore.
    """
    splits = _open_splits(config)
    corpus = splits[config.test_split].corpus
    base_sha256 = fingerprint_model(config.model)
    source = TransformersSource(config.model, dtype=config.dtype, device=config.device, attention=config.attention)
    _check_model(source, config.model, corpus, flag="--model")
    memories = [] if config.memory is None else [
        _open_memory(config.memory, MEMORY, config, corpus, source, base_sha256, flag="--memory")
    ]
    models = []
    for name, root in _control_directories(config.control).items():
        flag = f"--control {name}"
        if _holds_memory(root, flag):
            memories.append(_open_memory(root, f"base+{name}", config, corpus, source, base_sha256, flag=flag))
        else:
            models.append(_open_model(root, name, config, corpus))
    datastore = _open_datastore(config, splits, source, base_sha256)
    _refuse_training_text(splits, memories, datastore)
    return _Inputs(
        splits=splits, source=source, base_sha256=base_sha256, datastore=datastore, memories=memories, models=models,
        seconds=_seconds(config, memories, models),
    )


def _open_splits(config: Config) -> dict[str, _Split]:
    """Tuning, test and further splits; a corpus that was not split is dealt in halves by the documents' names."""
    present = {name for name, tokens in num_tokens_of_splits(config.corpus).items() if tokens >= 2}
    wanted = [config.tuning_split, config.test_split, *(name for name in config.extra_splits if name in present)]
    if present == {"train"} and "train" not in wanted:
        splits = _deal_halves(config)
    else:
        for name in config.extra_splits:
            if name not in present:
                _logger.info("the corpus has no split %s: the report goes without it", name)
        corpora = {name: open_corpus(config.corpus, name) for name in wanted}
        splits = {name: _Split(name=name, corpus=corpus, positions=None, num_bytes=corpus.num_bytes)
                  for name, corpus in corpora.items()}
    for split in splits.values():
        if split.num_positions <= config.bootstrap_block or split.num_bytes == 0:
            raise UserError(
                f"the {split.name} split has {split.num_positions:,} positions, and the intervals need more than one block of "
                f"--bootstrap-block {config.bootstrap_block}: give more text or a smaller block"
            )
    return splits


def _deal_halves(config: Config) -> dict[str, _Split]:
    corpus = open_corpus(config.corpus, "train")
    is_tuning = np.array([hash_fraction(f"evaluate:{document['name']}") < 0.5 for document in corpus.documents])
    sizes = np.array([document["bytes"] for document in corpus.documents])
    document_of_N = corpus.documents_of(np.arange(corpus.num_positions))
    _logger.info("the corpus is not split: its %d documents are dealt to %s and %s by their names", len(sizes),
                 config.tuning_split, config.test_split)
    return {
        name: _Split(name=name, corpus=corpus, positions=np.flatnonzero(chosen[document_of_N]),
                     num_bytes=int(sizes[chosen].sum()))
        for name, chosen in ((config.tuning_split, is_tuning), (config.test_split, ~is_tuning))
    }


def _check_model(source: StateSource, path: str, corpus: CorpusSplit, *, flag: str) -> None:
    """Refuse a model that cannot read the corpus, or whose own tokenizer gives the same words other numbers."""
    try:
        check_source_reads(source, corpus)
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from error
    own, common = Path(path) / "tokenizer.json", corpus.tokenizer_path / "tokenizer.json"
    if not own.is_file() or not common.is_file():
        return
    ids = Tokenizer.from_file(str(common)).get_vocab()
    for token, number in Tokenizer.from_file(str(own)).get_vocab().items():
        if ids.get(token, number) != number:
            raise UserError(
                f"{flag} {path} has another vocabulary than the corpus: {token!r} is {number} there and {ids[token]} here; "
                "prepare the corpus with the model's own tokenizer"
            )


def _holds_memory(root: Path, flag: str) -> bool:
    """Whether a directory is a training output or an exported memory; else it is a language model."""
    if (root / "weights").is_dir() or (root / "checkpoints").is_dir():
        return True
    if not (root / "config.json").is_file():
        raise UserError(f"{flag}: {root} holds neither a memory nor a language model: give an output of launch/train.py, an "
                        "exported memory, or a Hugging Face model directory")
    return _is_export(root)


def _is_export(root: Path) -> bool:
    return (root / "config.json").is_file() and read_json(root / "config.json").get("model_type") == "mlpmem"


def _open_memory(
    root: Path, arm: str, config: Config, corpus: CorpusSplit, source: TransformersSource, base_sha256: str, *, flag: str
) -> _MemoryArm:
    """Read a memory and make sure that it belongs to this base and vocabulary."""
    if _is_export(root):
        memory, provenance, layer, point, vocabulary = _read_export(root, flag)
        sha256, directory, is_training = fingerprint_model(str(root)), root, False
    else:
        trained = read_weights(root, flag=flag)
        provenance = trained.provenance
        memory = _build_memory(trained.memory, trained.weights, f"{flag} {root}")
        layer, point = provenance["input_layer"], provenance["key_point"]
        vocabulary = provenance["vocabulary_sha256"]
        sha256, directory, is_training = trained.sha256, root / "weights", True
    if provenance.get("base") != base_sha256:
        raise UserError(
            f"{flag} {root} was trained for another base ({str(provenance.get('base'))[:12]}…) than --model {config.model} "
            f"({base_sha256[:12]}…): give the base that its keys were extracted from"
        )
    if vocabulary != corpus.vocabulary_sha256 or memory.config.vocab_size < corpus.vocab_size:
        raise UserError(
            f"{flag} {root} was trained with another vocabulary ({memory.config.vocab_size} entries, {str(vocabulary)[:12]}…) than "
            f"the corpus has ({corpus.vocab_size}, {corpus.vocabulary_sha256[:12]}…): prepare the corpus with the same tokenizer"
        )
    if memory.config.input_size != source.width:
        raise UserError(f"{flag} {root} reads vectors of {memory.config.input_size} numbers, the base's have {source.width}: "
                        "give the base that it was trained for")
    return _MemoryArm(
        arm=arm, root=root, sha256=sha256, provenance=provenance, is_training=is_training, bytes=_bytes_of_model(directory),
        memory=memory.to(dtype=source.model.dtype, device=source.device).eval().requires_grad_(False),
        point=resolve_point(source, layer, point, flag=flag),
    )


def _build_memory(shape: Mapping[str, Any], weights: Mapping[str, torch.Tensor], name: str) -> Memory:
    try:
        with torch.device("meta"):
            memory = Memory(MemoryConfig.from_dict(shape))
        memory.load_state_dict(dict(weights), assign=True)
    except (ValueError, RuntimeError) as error:
        raise DamagedDataError(f"{name}: the weights do not fit the memory's configuration ({error}): train it again") from error
    return memory


def _read_export(root: Path, flag: str) -> tuple[Memory, dict[str, Any], int, str, str]:
    """(memory, provenance, input layer, input point, vocabulary) of an exported joint model; its base is not kept."""
    from mlpmem_ds.models.hf import MemoryAugmentedLM

    try:
        joint = MemoryAugmentedLM.from_pretrained(root, dtype="auto")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {root} cannot be loaded ({error}): export the memory again") from error
    config = joint.config
    return joint.memory, config.provenance, config.input_layer, config.input_point, config.vocabulary_sha256


def _open_model(root: Path, name: str, config: Config, corpus: CorpusSplit) -> _ModelArm:
    flag = f"--control {name}"
    if (root / "identity.json").is_file() and not (root / "manifest.json").is_file():
        raise UserError(f"{flag}: {root} is not complete: run its stage again, it continues")
    sha256 = fingerprint_model(str(root))
    source = TransformersSource(str(root), dtype=config.dtype, device=config.device, attention=config.attention)
    _check_model(source, str(root), corpus, flag=flag)
    return _ModelArm(arm=name, path=str(root), sha256=sha256, source=source)


def _open_datastore(
    config: Config, splits: Mapping[str, _Split], source: TransformersSource, base_sha256: str
) -> _Datastore | None:
    """Open keys, index and targets, and make sure that they are of this base and of each other."""
    if config.keys is None:
        return None
    keys = open_keys(config.keys)
    corpus = splits[config.test_split].corpus
    if keys.manifest["inputs"]["model"] != base_sha256:
        raise UserError(
            f"--keys {config.keys} were extracted from another base ({keys.manifest['inputs']['model'][:12]}…) than --model "
            f"{config.model} ({base_sha256[:12]}…): give that base, or extract keys with this one"
        )
    if keys.manifest["vocab_size"] != corpus.vocab_size:
        raise UserError(
            f"--keys {config.keys} have a vocabulary of {keys.manifest['vocab_size']}, the corpus one of {corpus.vocab_size}: "
            "prepare the corpus with the same tokenizer"
        )
    if keys.manifest["config"].get("dtype", source.dtype_name) != source.dtype_name:
        _logger.warning("the keys were extracted in %s and the queries are computed in %s: --dtype makes them equal",
                        keys.manifest["config"]["dtype"], source.dtype_name)
    index = None if config.index is None else open_index(config.index)
    if index is not None and index.keys_sha256 != keys.sha256:
        raise UserError(f"--index {config.index} is of other keys than --keys {config.keys}: build it again from these")
    targets = None if config.targets is None else _read_targets(config.targets, keys)
    temperature = config.temperature or (targets["temperature"] if targets else None)
    if temperature is None:
        raise UserError("the kNN arms need a temperature: give --targets, whose temperature they take, or --temperature")
    point = CapturePoint(layer=keys.manifest["key_layer"], point=keys.manifest["key_point"])
    return _Datastore(
        keys=keys, index=index, k=config.k or (targets["k"] if targets else _DEFAULT_K), nprobe=config.nprobe,
        temperature=float(temperature), exact=config.exact, point=point,
    )


def _read_targets(root: Path, keys: Keys) -> dict[str, Any]:
    manifest, _ = read_manifest(root, stage="targets", version=1, flag="--targets")
    if manifest["inputs"]["keys"] != keys.sha256:
        raise UserError(f"--targets {root} are of other keys than --keys {keys.root}: write them again from these")
    return manifest


def _refuse_training_text(
    splits: Mapping[str, _Split], memories: Sequence[_MemoryArm], datastore: _Datastore | None
) -> None:
    """No arm may be judged on the text that the datastore holds or the memory was trained on."""
    trained = {(memory.provenance.get("corpus"), memory.provenance.get("split", "train")) for memory in memories}
    if datastore is not None:
        trained.add((datastore.keys.corpus_sha256, datastore.keys.manifest["split"]))
    for split in splits.values():
        if (split.corpus.sha256, split.corpus.name) in trained:
            raise UserError(
                f"the {split.name} split is the text that the keys or the memory were made from ({split.corpus.root}, "
                f"{split.corpus.name}): choose other splits, or prepare the corpus with --tuning-fraction and --test-fraction"
            )


def _seconds(config: Config, memories: Sequence[_MemoryArm], models: Sequence[_ModelArm]) -> dict[str, float | None]:
    """Arm → seconds that its stages took beyond the base, from their logs; None where a log is not at hand."""
    targets = None if config.targets is None else read_json(config.targets / "manifest.json")
    searched = [config.index] if targets is not None and targets["search"] == "ivf" else []
    seconds: dict[str, float | None] = {
        BASE: 0.0,
        KNN_EXACT: _sum_of_logs([config.keys]),
        KNN_IVFPQ: _sum_of_logs([config.keys, config.index]),
    }
    for memory in memories:
        root = memory.root if memory.is_training else None
        needs_targets = memory.provenance.get("alpha") != 0
        stages = [config.keys, *(searched + [config.targets] if needs_targets else []), root]
        seconds[memory.arm] = _sum_of_logs(stages)
    return seconds | {model.arm: _sum_of_logs([Path(model.path)]) for model in models}


def _sum_of_logs(roots: Sequence[Path | None]) -> float | None:
    logged = [None if root is None else seconds_of_stage(root) for root in roots]
    return None if None in logged else sum(seconds for seconds in logged if seconds is not None)


def seconds_of_stage(root: Path) -> float | None:
    """Wall-clock seconds that a stage's runs took, from its log.jsonl; None without one.

    A rank is at work from its `started` to its last event before the next; where ranks overlap, time counts once. So
    the runs of a resumed stage add up, a killed run's up to its last event.
    """
    spans: list[list[float]] = []
    open_span: dict[int, list[float]] = {}
    for event in read_events(root / "log.jsonl"):
        if event["event"] == "started":
            open_span[event["rank"]] = [event["time"], event["time"]]
            spans.append(open_span[event["rank"]])
        elif event["rank"] in open_span:
            open_span[event["rank"]][1] = event["time"]
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total if spans else None


def _hashes(inputs: _Inputs) -> dict[str, str]:
    hashes = {"corpus": next(iter(inputs.splits.values())).corpus.sha256, "model": inputs.base_sha256}
    if inputs.datastore is not None:
        hashes["keys"] = inputs.datastore.keys.sha256
        if inputs.datastore.index is not None:
            hashes["index"] = inputs.datastore.index.sha256
    return hashes | {arm.arm: arm.sha256 for arm in (*inputs.memories, *inputs.models)}


def _resolved(inputs: _Inputs) -> dict[str, Any]:
    """The values behind the defaults that decide the scores."""
    store = inputs.datastore
    return {"dtype": inputs.source.dtype_name, "k": store and store.k, "temperature": store and store.temperature}


def _list_units(config: Config, inputs: _Inputs) -> dict[str, _Unit]:
    """All units by name: first those of the base, the dear ones, then those of each model of its own."""
    units = {}
    for model in (None, *inputs.models):
        for stream, corpus in inputs.streams.items():
            for block in split_blocks(corpus.num_positions, config.unit_positions):
                middle = "" if model is None else f"{model.arm}-"
                name = f"{stream}-{middle}{unit_name(block.start)}"
                units[name] = _Unit(name=name, stream=stream, block=block, model=model)
    return units


def _score_base_unit(config: Config, inputs: _Inputs, unit: _Unit, writer: UnitWriter) -> dict[str, Any]:
    """One pass of the base, then what each arm on it makes of its states."""
    corpus, store, seconds = inputs.streams[unit.stream], inputs.datastore, {}
    points = {memory.arm: memory.point for memory in inputs.memories}
    if store is not None and store.arms:
        points["key"] = store.point
    with _timed(seconds, BASE):
        log_probabilities_n, states = _scan(config, inputs.source, corpus, unit.block, points)
    writer.array(unit.file(BASE), log_probabilities_n)
    values_n = corpus.values(*unit.block)
    for arm in store.arms if store is not None else []:
        assert store is not None
        # What stays in memory from one unit to the next is read outside the clock.
        _ = store.stored_NE, store.values_N, store.codec, arm == KNN_IVFPQ and store.shards
        with _timed(seconds, arm):
            neighbours = store.search(arm, store.encode(states["key"].numpy()))
            scores_nT = store.log_probabilities(neighbours, values_n)
        writer.array(unit.file(arm), scores_nT)
    for memory in inputs.memories:
        with _timed(seconds, memory.arm):
            scores_n = memory_log_probabilities(memory.memory, states[memory.arm], values_n)
        writer.array(unit.file(memory.arm), scores_n)
    return {"positions": unit.block.size, "seconds": seconds, "threads": torch.get_num_threads(),
            "device": str(inputs.source.device)}


def _score_model_unit(config: Config, inputs: _Inputs, unit: _Unit, writer: UnitWriter) -> dict[str, Any]:
    assert unit.model is not None
    seconds: dict[str, float] = {}
    with _timed(seconds, unit.model.arm):
        scores_n, _ = _scan(config, unit.model.source, inputs.streams[unit.stream], unit.block, {})
    writer.array(unit.file(unit.model.arm), scores_n)
    return {"positions": unit.block.size, "seconds": seconds}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 4)


def _scan(
    config: Config, source: StateSource, corpus: CorpusSplit, block: Block, points: Mapping[str, CapturePoint]
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Log-probabilities of the values, float32 [n], and the named states, float32 [n, D]."""
    rows = list(scan_positions(source, corpus, block, points, batch_windows=config.batch_windows))
    log_probabilities_n = np.concatenate([batch.log_probabilities for batch in rows])
    if not np.isfinite(log_probabilities_n).all():
        position = block.start + int(np.flatnonzero(~np.isfinite(log_probabilities_n))[0])
        raise UserError(f"the log-probability at position {position} of split {corpus.name} is not finite: the model's weights "
                        "are damaged, or --dtype float32 is needed")
    return log_probabilities_n, {name: torch.cat([batch.states[name] for batch in rows]) for name in points}


@torch.no_grad()
def memory_log_probabilities(memory: Memory, inputs_nD: torch.Tensor, values_n: np.ndarray) -> np.ndarray:
    """log p_mem(value), float32 [n], from float32 logits; the inputs are taken to the memory's dtype and device."""
    weight_VH: torch.Tensor = memory.head.weight  # type: ignore[assignment]
    hidden_nH = memory(inputs_nD.to(dtype=weight_VH.dtype, device=weight_VH.device))
    values = torch.from_numpy(values_n).to(weight_VH.device)
    return label_log_probabilities(hidden_nH, weight_VH, values).cpu().numpy()


def rescore(queries_nE: np.ndarray, ids_nK: np.ndarray, stored_NE: np.ndarray) -> np.ndarray:
    """Squared distances of each query to the stored keys of these ids [n, K]: int64 and exact for int8, else float64.

    Missing ids (-1) get the greatest value of the dtype.
    """
    is_integer = stored_NE.dtype == np.int8
    dtype = np.dtype(np.int64 if is_integer else np.float64)
    distances_nK = np.empty(ids_nK.shape, dtype)
    step = max(1, _RESCORE_ELEMENTS // max(1, ids_nK.shape[1] * stored_NE.shape[1]))
    for start in range(0, len(ids_nK), step):
        rows = slice(start, start + step)
        keys_bKE = torch.from_numpy(stored_NE[ids_nK[rows]]).float()
        queries_bE1 = torch.from_numpy(queries_nE[rows]).float()[:, :, None]
        # Of int8 codes of up to 1,040 numbers these float32 sums are exact integers below 2^24.
        products_bK = (keys_bKE @ queries_bE1)[:, :, 0].double()
        norms_bK = torch.linalg.vecdot(keys_bKE, keys_bKE).double()
        norms_b1 = queries_bE1.square().sum(1).double()
        distances_nK[rows] = (norms_bK - 2 * products_bK + norms_b1).clamp_(min=0).numpy().astype(dtype)
    greatest = np.iinfo(dtype).max if is_integer else np.finfo(dtype).max
    return np.where(ids_nK >= 0, distances_nK, greatest)


def _evaluate(
    config: Config, inputs: _Inputs, directory: StageDirectory, units: Mapping[str, _Unit]
) -> dict[str, Any]:
    """eval.json, from the score files and what the units noted."""
    summaries = {name: directory.read_record(name)["summary"] for name in units}
    run_record = read_json(config.output / "run.json")
    tests = tuple(name for name in inputs.splits if name != config.tuning_split)
    protocol = Protocol(
        tuning=config.tuning_split,
        tests=tests,
        num_bytes={name: split.num_bytes for name, split in inputs.splits.items()},
        lambdas=lambda_grid(config.lambdas),
        bootstrap_samples=config.bootstrap_samples,
        bootstrap_block=config.bootstrap_block,
    )
    arms = [_describe_arm(arm, config, inputs, units, summaries) for arm in inputs.arms]
    store, corpus = inputs.datastore, inputs.splits[config.test_split].corpus
    first = next(iter(summaries.values()))
    return {
        "format": f"mlpmem-{FORMAT}",
        "version": VERSION,
        "date": run_record["date"],
        "machine": run_record["machine"],
        "tuning_split": config.tuning_split,
        "test_split": config.test_split,
        "extra_splits": list(tests[1:]),
        "tokens": {name: split.num_positions for name, split in inputs.splits.items()},
        "lambdas": list(protocol.lambdas),
        "settings": {
            "k": store and store.k,
            "temperature": store and store.temperature,
            "temperature_factors": list(TEMPERATURE_FACTORS),
            "nprobe": config.nprobe if store and store.index else None,
            "index_factory": store.index.factory if store and store.index else None,
            "bootstrap_samples": config.bootstrap_samples,
            "bootstrap_block": config.bootstrap_block,
            "block_size": corpus.block_size,
            "stride": corpus.stride,
            "dtype": inputs.source.dtype_name,
            "device": first["device"],
            "threads": first["threads"],
        },
        **summarise(arms, protocol),
    }


def _describe_arm(
    arm: str, config: Config, inputs: _Inputs, units: Mapping[str, _Unit], summaries: Mapping[str, Mapping[str, Any]]
) -> Arm:
    """An arm's scores by split, and its price."""
    memory = next((memory for memory in inputs.memories if memory.arm == arm), None)
    model = next((model for model in inputs.models if model.arm == arm), None)
    parameters = _num_parameters(inputs.source.model if model is None else model.source.model)
    num_bytes = _bytes_of_source(config.model, inputs.source) if model is None else _bytes_of_source(model.path, model.source)
    if memory is not None:
        parameters, num_bytes = parameters + _num_parameters(memory.memory), num_bytes + memory.bytes
    store = inputs.datastore
    is_knn = store is not None and arm in store.arms
    if is_knn:
        assert store is not None
        num_bytes += _bytes_of_datastore(store, with_index=arm == KNN_IVFPQ)
    mine = [unit for unit in units.values() if unit.model is model]
    by_stream = {
        stream: np.concatenate([np.load(config.output / unit.file(arm), allow_pickle=False)
                                for unit in mine if unit.stream == stream])
        for stream in inputs.streams
    }
    test_units = [unit for unit in mine if unit.stream == inputs.splits[config.test_split].corpus.name]
    parts = {arm} if model is not None else {BASE, arm}
    test_seconds = sum(summaries[unit.name]["seconds"][part] for unit in test_units for part in parts)
    return Arm(
        name=arm,
        scores={name: split.take(by_stream[split.corpus.name]) for name, split in inputs.splits.items()},
        alone=arm == BASE or model is not None,
        parameters=parameters,
        bytes=num_bytes,
        seconds=inputs.seconds[arm],
        tokens_per_second=sum(unit.block.size for unit in test_units) / test_seconds if test_seconds else None,
        temperatures=store.temperatures if store is not None and is_knn else (),
    )


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes_of_model(root: Path) -> int:
    """Configuration and weights of a model directory."""
    files = [root / "config.json", *root.glob("*.safetensors"), *root.glob("*.bin")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _bytes_of_source(path: str, source: TransformersSource) -> int:
    """Of a model directory, or (a Hub name) of the weights as they are in memory."""
    if Path(path).is_dir():
        return _bytes_of_model(Path(path))
    return sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters())


def _bytes_of_datastore(store: _Datastore, *, with_index: bool) -> int:
    """Keys, values and codec; and the index."""
    names: Callable[[str], bool] = lambda name: name.startswith(("keys-", "values-", "codec/"))  # noqa: E731
    keys = sum(entry["bytes"] for entry in store.keys.manifest["files"] if names(entry["name"]))
    return keys + (store.index.num_bytes if with_index and store.index is not None else 0)


def _write_report(output: Path, evaluation: Mapping[str, Any]) -> None:
    publish_json(output / "eval.json", evaluation)
    plot_lambda_curves(evaluation, output / "lambda.png")
    plot_costs(evaluation, output / "cost.png")
    publish_bytes(output / "report.md", render_report(evaluation).encode())

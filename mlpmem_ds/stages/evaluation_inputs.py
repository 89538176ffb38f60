"""The flags of `evaluate` and what it reads (splits, base, retriever, memories, controls), checked before anything is written.

Each check refuses a pair that does not belong together (a memory of another base, an index of other keys, text that was
trained on) with the names of both and the remedy.

N positions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.core.log import seconds_of_stage
from mlpmem_ds.core.stage_directory import read_manifest
from mlpmem_ds.engines.hidden_states import (
    TransformersSource,
    check_source_reads,
    fingerprint_model,
    resolve_point,
)
from mlpmem_ds.formats.checkpoint import MEMORY_STAGE, read_weights
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.stages.report import BASE, KNN_EXACT, KNN_IVFPQ, MEMORY
from mlpmem_ds.stages.retriever import Retriever

_logger = logging.getLogger(__name__)
_DEFAULT_K = 256
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
        "further arms: base+NAME=a memory, NAME=a language model of its own",
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
        "kNN temperature in squared key units (default: the targets'); 1/4 to 4 times it are tried",
        None,
        identity=False,
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
            raise UserError(
                f"the splits {', '.join(splits)} must differ: nothing is tested on the text that λ is chosen on"
            )
        if self.index is not None and self.keys is None:
            raise UserError(
                "--index needs --keys, the directory that it was built from: found distances are rescored from it"
            )
        control_directories(self.control)


@dataclass(frozen=True, kw_only=True)
class Split:
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
class MemoryArm:
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
class ModelArm:
    """A language model of its own: a control that replaces the base."""

    arm: str
    path: str
    sha256: str
    source: TransformersSource


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that the evaluation reads, opened and checked."""

    splits: Mapping[str, Split]  # in the order tuning, test, extra
    source: TransformersSource
    base_sha256: str
    datastore: Retriever | None
    memories: Sequence[MemoryArm]
    models: Sequence[ModelArm]
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


def open_inputs(config: Config, local_rank: int = 0) -> Inputs:
    """Open and check everything; nothing has been written yet.

    Raises:
        UserError: an input is missing, or does not belong to this base, corpus or datastore.
    """
    splits = _open_splits(config)
    corpus = splits[config.test_split].corpus
    base_sha256 = fingerprint_model(config.model)
    source = TransformersSource(
        config.model, dtype=config.dtype, device=config.device, attention=config.attention, local_rank=local_rank
    )
    check_source_reads(source, corpus, config.model)
    memories = (
        []
        if config.memory is None
        else [_open_memory(config.memory, MEMORY, config, corpus, source, base_sha256, flag="--memory")]
    )
    models = []
    for name, root in control_directories(config.control).items():
        flag = f"--control {name}"
        if _holds_memory(root, flag):
            arm = f"base+{name.removeprefix('base+')}"
            memories.append(_open_memory(root, arm, config, corpus, source, base_sha256, flag=flag))
        elif name.startswith("base+"):
            raise UserError(
                f"{flag}: {root} is a language model of its own, and arms named base+… are the base with something beside "
                "it: choose another name"
            )
        else:
            models.append(_open_model(root, name, config, corpus, device=str(source.device)))
    if len({memory.arm for memory in memories}) < len(memories):
        raise UserError("two of the controls have the same name: choose another for one of them")
    datastore = _open_datastore(config, splits, source, base_sha256)
    _refuse_training_text(splits, memories, datastore)
    return Inputs(
        splits=splits,
        source=source,
        base_sha256=base_sha256,
        datastore=datastore,
        memories=memories,
        models=models,
        seconds=_seconds(config, memories, models),
    )


def _open_splits(config: Config) -> dict[str, Split]:
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
        splits = {
            name: Split(name=name, corpus=corpus, positions=None, num_bytes=corpus.num_bytes)
            for name, corpus in corpora.items()
        }
    for split in splits.values():
        if split.num_positions <= config.bootstrap_block or split.num_bytes == 0:
            raise UserError(
                f"the {split.name} split has {split.num_positions:,} positions, and the intervals need more than one block of "
                f"--bootstrap-block {config.bootstrap_block}: give more text or a smaller block"
            )
    return splits


def _deal_halves(config: Config) -> dict[str, Split]:
    corpus = open_corpus(config.corpus, "train")
    is_tuning = np.array([hash_fraction(f"evaluate:{document['name']}") < 0.5 for document in corpus.documents])
    sizes = np.array([document["bytes"] for document in corpus.documents])
    document_of_N = corpus.documents_of(np.arange(corpus.num_positions))
    _logger.info(
        "the corpus is not split: its %d documents are dealt to %s and %s by their names",
        len(sizes),
        config.tuning_split,
        config.test_split,
    )
    return {
        name: Split(
            name=name,
            corpus=corpus,
            positions=np.flatnonzero(chosen[document_of_N]),
            num_bytes=int(sizes[chosen].sum()),
        )
        for name, chosen in ((config.tuning_split, is_tuning), (config.test_split, ~is_tuning))
    }


def control_directories(controls: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR words → name of the arm and directory.

    Raises:
        UserError: not of that form, or a name that is taken.
    """
    directories: dict[str, Path] = {}
    for word in controls:
        name, sign, directory = word.partition("=")
        if not sign or not directory or not re.fullmatch(r"(base\+)?\w+", name):
            raise UserError(f"--control {word}: give NAME=DIR with a name of letters, digits and underscores")
        if name in directories or name.removeprefix("base+") in _RESERVED_NAMES:
            raise UserError(f"--control {word}: the name {name} is taken; choose another")
        directories[name] = Path(directory)
    return directories


def _holds_memory(root: Path, flag: str) -> bool:
    """Whether a directory is a training output or an exported memory; else it is a language model."""
    identity = root / "identity.json"
    if identity.is_file() and read_json(identity).get("format") == f"mlpmem-{MEMORY_STAGE}":
        return True  # finished or not: reading it says which
    if not (root / "config.json").is_file():
        raise UserError(
            f"{flag}: {root} holds neither a memory nor a language model: give an output of launch/train.py, an "
            "exported memory, or a Hugging Face model directory"
        )
    return _is_export(root)


def _is_export(root: Path) -> bool:
    return (root / "config.json").is_file() and read_json(root / "config.json").get("model_type") == "mlpmem"


def _open_memory(
    root: Path,
    arm: str,
    config: Config,
    corpus: CorpusSplit,
    source: TransformersSource,
    base_sha256: str,
    *,
    flag: str,
) -> MemoryArm:
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
            f"{flag} {root} was trained with another vocabulary ({memory.config.vocab_size} entries, "
            f"{str(vocabulary)[:12]}…) than the corpus has ({corpus.vocab_size}, {corpus.vocabulary_sha256[:12]}…): "
            "prepare the corpus with the same tokenizer"
        )
    if memory.config.input_size != source.width:
        raise UserError(
            f"{flag} {root} reads vectors of {memory.config.input_size} numbers, the base's have {source.width}: "
            "give the base that it was trained for"
        )
    return MemoryArm(
        arm=arm,
        root=root,
        sha256=sha256,
        provenance=provenance,
        is_training=is_training,
        bytes=bytes_of_model(directory),
        memory=memory.to(dtype=source.model.dtype, device=source.device).eval().requires_grad_(False),
        point=resolve_point(source, layer, point, flag=flag),
    )


def _build_memory(shape: Mapping[str, Any], weights: Mapping[str, torch.Tensor], name: str) -> Memory:
    try:
        with torch.device("meta"):
            memory = Memory(MemoryConfig.from_dict(shape))
        memory.load_state_dict(dict(weights), assign=True)
    except (ValueError, RuntimeError) as error:
        raise DamagedDataError(
            f"{name}: the weights do not fit the memory's configuration ({error}): train it again"
        ) from error
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


def _open_model(root: Path, name: str, config: Config, corpus: CorpusSplit, *, device: str) -> ModelArm:
    flag = f"--control {name}"
    if (root / "identity.json").is_file() and not (root / "manifest.json").is_file():
        raise UserError(f"{flag}: {root} is not complete: run its stage again, it continues")
    sha256 = fingerprint_model(str(root))
    source = TransformersSource(str(root), dtype=config.dtype, device=device, attention=config.attention)
    check_source_reads(source, corpus, str(root), flag=flag)
    return ModelArm(arm=name, path=str(root), sha256=sha256, source=source)


def _open_datastore(
    config: Config, splits: Mapping[str, Split], source: TransformersSource, base_sha256: str
) -> Retriever | None:
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
        _logger.warning(
            "the keys were extracted in %s and the queries are computed in %s: --dtype makes them equal",
            keys.manifest["config"]["dtype"],
            source.dtype_name,
        )
    index = None if config.index is None else open_index(config.index)
    if index is not None and index.keys_sha256 != keys.sha256:
        raise UserError(f"--index {config.index} is of other keys than --keys {config.keys}: build it again from these")
    targets = None if config.targets is None else _read_targets(config.targets, keys)
    temperature = config.temperature or (targets["temperature"] if targets else None)
    if temperature is None:
        raise UserError(
            "the kNN arms need a temperature: give --targets, whose temperature they take, or --temperature"
        )
    point = CapturePoint(layer=keys.manifest["key_layer"], point=keys.manifest["key_point"])
    return Retriever(
        keys=keys,
        index=index,
        k=config.k or (targets["k"] if targets else _DEFAULT_K),
        nprobe=config.nprobe,
        temperature=float(temperature),
        exact=config.exact,
        point=point,
    )


def _read_targets(root: Path, keys: Keys) -> dict[str, Any]:
    manifest, _ = read_manifest(root, stage="targets", version=1, flag="--targets")
    if manifest["inputs"]["keys"] != keys.sha256:
        raise UserError(f"--targets {root} are of other keys than --keys {keys.root}: write them again from these")
    return manifest


def _refuse_training_text(
    splits: Mapping[str, Split], memories: Sequence[MemoryArm], datastore: Retriever | None
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


def _seconds(config: Config, memories: Sequence[MemoryArm], models: Sequence[ModelArm]) -> dict[str, float | None]:
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


def bytes_of_model(root: Path) -> int:
    """Configuration and weights of a model directory."""
    files = [root / "config.json", *root.glob("*.safetensors"), *root.glob("*.bin")]
    return sum(path.stat().st_size for path in files if path.is_file())

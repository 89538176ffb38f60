"""After training: a finished memory and its base → one Hugging Face directory that loads without this package.

    OUTPUT/
      config.json, generation_config.json, model*.safetensors     the joint model, the base included
      hf.py, memory.py, backbone.py                               its code, for `trust_remote_code=True`
      tokenizer*.json, …                                          the corpus's vocabulary
      README.md                                                   the model card
      mlpmem_export.json                                          format, inputs, verification, every file's checksum

All of it is written into `.OUTPUT.<host>.<pid>.partial/` beside OUTPUT, loaded again through its own code, compared with
the base and the memory as trained, flushed, and only then renamed. What a killed run leaves, the next one removes.

B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import mlpmem_ds
from mlpmem_ds.core.config import option
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, canonical_json, fault_of_file, read_json, record_file, sha256_of_file
from mlpmem_ds.core.stage_directory import read_manifest, require_free_bytes
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import DTYPES, fingerprint_model
from mlpmem_ds.formats.checkpoint import TrainedMemory, read_weights
from mlpmem_ds.maths.interpolation import interpolate
from mlpmem_ds.models.backbone import CapturePoint, capture, load_base
from mlpmem_ds.models.hf import MemoryAugmentedLM, checked_lmbda
from mlpmem_ds.models.memory import Memory, MemoryConfig
from mlpmem_ds.stages.prepare_corpus import vocabulary_sha256

_logger = logging.getLogger(__name__)
FORMAT, VERSION = "mlpmem-export", 1
EXPORT_FILE = "mlpmem_export.json"
DEFAULT_LAMBDA = 0.25
# The loaded model and its parts do the same operations on the same numbers: what is left is float32 against float64 in
# the softmax and the mixture. Largest difference of log-probabilities over the largest log-probability; for every dtype.
LOGIT_BOUND = 1e-6
# A 16-bit export against float32: mean total variation of the next-token distributions. Rounding costs about 1e-2; more
# than this is an overflow or a base that the dtype cannot hold.
ROUNDING_BOUND = 0.1
_PROBE_SHAPE = (4, 32)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is joined, and how it is stored."""

    checkpoint: Path = option("output directory of a finished launch/train.py")
    output: Path = option("Hugging Face directory to write")
    model: str | None = option("the base: a directory or Hub name (default: the one that the keys were extracted with)", None)
    lmbda: float | None = option(
        f"--lambda: weight of the memory in [0, 1] (default: the report's choice, else {DEFAULT_LAMBDA})", None, metavar="NUMBER"
    )
    report: Path | None = option("report of launch/evaluate.py: its λ, and its perplexities for the model card", None)
    dtype: Literal["float32", "bfloat16", "float16"] = option("of the stored weights", "float32")
    tokenizer: str | None = option("directory or Hub name (default: the base's, else the corpus's)", None)
    max_shard_gigabytes: float = option("largest weights file, in GB", 5.0)
    attention: str = option("attention implementation for the verification: sdpa, eager or flash_attention_2", "sdpa")

    def __post_init__(self) -> None:
        if self.lmbda is not None:
            try:
                checked_lmbda(self.lmbda)
            except ValueError as error:
                raise UserError(f"--lambda {self.lmbda}: the memory's share of the mixture lies in [0, 1]") from error
        if not 0 < self.max_shard_gigabytes < math.inf:
            raise UserError(f"--max-shard-gigabytes must be more than 0, not {self.max_shard_gigabytes}")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The checked inputs; nothing has been written yet."""

    trained: TrainedMemory
    memory: MemoryConfig
    model: str
    base_sha256: str
    tokenizer: Any
    lmbda: float
    lmbda_rule: str
    report: dict[str, Any] | None
    report_sha256: str | None
    corpus: dict[str, Any] | None
    """the corpus's manifest, where it is at hand"""
    targets: dict[str, Any] | None

    def identity(self, config: Config) -> dict[str, Any]:
        """What the weights and the configuration depend on."""
        inputs = {"memory": self.trained.sha256, "base": self.base_sha256,
                  "vocabulary": self.trained.provenance["vocabulary_sha256"]}
        if self.report_sha256 is not None:
            inputs["report"] = self.report_sha256
        return {"format": FORMAT, "version": VERSION, "inputs": inputs,
                "config": {"lambda": self.lmbda, "dtype": config.dtype, "max_shard_gigabytes": config.max_shard_gigabytes}}


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """What the two parts give on the probe batch, float64 log-probabilities [B, S, V]."""

    ids_BS: torch.Tensor
    base_BSV: torch.Tensor
    memory_BSV: torch.Tensor

    def mixture_BSV(self, lmbda: float) -> torch.Tensor:
        return interpolate(self.base_BSV, self.memory_BSV, lmbda)


@dataclass(frozen=True, kw_only=True)
class _Built:
    """The joint model before it is written, and what its parts give."""

    joint: MemoryAugmentedLM
    probe: _Probe
    rounding: float
    """of the stored dtype: mean total variation against float32; 0 for float32"""

    @property
    def num_base_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.joint.base.parameters())


def run(config: Config, world: World) -> None:
    """Write, verify and publish the export, or say that it is complete. One process does it; other ranks return."""
    if not world.is_first:
        return
    inputs, output = _open_inputs(config), config.output.resolve()
    identity = inputs.identity(config)
    if _is_complete(output, identity):
        _logger.info("complete: %s", config.output)
        return
    _require_disk(config, inputs)
    built = _build(config, inputs)
    with _partial_directory(output) as partial:
        export = partial / output.name  # the name of the copy of its code that transformers keeps
        verification = _write_and_verify(config, inputs, built, export)
        card = model_card(inputs, config, verification, built.num_base_parameters, _weight_bytes(export))
        (export / "README.md").write_text(card, encoding="utf-8")
        records = [record_file(export, path.relative_to(export).as_posix()) for path in _files_below(export)]
        manifest = {**identity, "mlpmem_ds": mlpmem_ds.__version__, "verification": verification,
                    "files": [record.to_json() for record in records]}
        (export / EXPORT_FILE).write_bytes(canonical_json(manifest))
        _publish(export, output, aside=partial / "replaced")
    _logger.info("complete: %s (λ %g, %s): %s", config.output, inputs.lmbda, config.dtype, _said(verification))


# The inputs


def _open_inputs(config: Config) -> _Inputs:
    """Open and check everything that the export is made from.

    Raises:
        UserError: something is missing, or does not belong to this memory.
    """
    _require_finished(config.checkpoint)
    trained = read_weights(config.checkpoint, flag="--checkpoint")
    wanted = {"base", "vocabulary_sha256", "input_layer", "key_point"}
    if lacking := sorted(wanted - set(trained.provenance)):
        raise DamagedDataError(f"--checkpoint {config.checkpoint} does not say its {', '.join(lacking)}: train it again")
    try:
        memory = MemoryConfig.from_dict(trained.memory)
    except ValueError as error:
        raise DamagedDataError(f"--checkpoint {config.checkpoint}: {error}: train it again") from error
    report, report_sha256, report_lmbda = _read_report(config, trained)
    lmbda, rule = _choose_lambda(config, report_lmbda)
    model = config.model or _model_of_keys(config, trained)
    base_sha256 = fingerprint_model(model)
    if base_sha256 != trained.provenance["base"]:
        raise UserError(
            f"--model {model} ({base_sha256[:12]}…) is not the base that --checkpoint {config.checkpoint} was trained for "
            f"({trained.provenance['base'][:12]}…): give the model that its keys were extracted with"
        )
    corpus_root = _input_of_training(config.checkpoint, "corpus", trained)
    targets_root = _input_of_training(config.checkpoint, "targets", trained)
    return _Inputs(
        trained=trained, memory=memory, model=model, base_sha256=base_sha256,
        tokenizer=_load_tokenizer(config, model, corpus_root, trained), lmbda=lmbda, lmbda_rule=rule,
        report=report, report_sha256=report_sha256,
        corpus=None if corpus_root is None else read_json(corpus_root / "manifest.json"),
        targets=None if targets_root is None else read_json(targets_root / "manifest.json"),
    )


def _require_finished(root: Path) -> None:
    if (root / EXPORT_FILE).is_file():
        raise UserError(f"--checkpoint {root} is an export already: give the output directory of launch/train.py")
    if (root / "identity.json").is_file() and not (root / "weights" / "model.safetensors").is_file():
        raise UserError(f"--checkpoint {root} is not finished (it has no weights/): run its launch/train.py command again, "
                        "it continues and writes them at the end")


def _read_report(config: Config, trained: TrainedMemory) -> tuple[dict[str, Any] | None, str | None, float | None]:
    """(eval.json, the report's hash, the λ that it chose for this memory)."""
    if config.report is None:
        return None, None, None
    manifest, sha256 = read_manifest(config.report, stage="report", version=1, flag="--report")
    evaluation = read_json(config.report / "eval.json")
    names = [name for name, value in manifest["inputs"].items() if value == trained.sha256]
    chosen = [arm["lambda"] for arm in evaluation.get("arms", []) if arm["name"] in names]
    if not chosen or chosen[0] is None:
        raise UserError(f"--report {config.report} does not evaluate the memory of --checkpoint {config.checkpoint}: run "
                        "launch/evaluate.py with that memory, or leave out --report and give --lambda")
    return evaluation, sha256, float(chosen[0])


def _choose_lambda(config: Config, report_lmbda: float | None) -> tuple[float, str]:
    """λ, and in words where it comes from."""
    if config.lmbda is not None:
        return float(config.lmbda), "given by hand"
    if report_lmbda is None:
        _logger.warning("neither --lambda nor --report: λ is %g, which nobody tuned; it can be set at any time", DEFAULT_LAMBDA)
        return DEFAULT_LAMBDA, "the default, not tuned"
    if report_lmbda == 0:
        _logger.warning("the report chose λ = 0: the memory does not help this base, and the export is the base alone")
    return report_lmbda, "least perplexity on the tuning split"


def _input_of_training(checkpoint: Path, name: str, trained: TrainedMemory) -> Path | None:
    """The directory that a memory was trained from, where training's flags or the run's layout lead to it.

    Only a directory whose manifest has the hash in the memory's provenance is taken.
    """
    flags = read_json(checkpoint / "run.json").get("config", {}) if (checkpoint / "run.json").is_file() else {}
    for place in (flags.get(name), checkpoint.resolve().parent / name):
        if not place or not (Path(place) / "manifest.json").is_file():
            continue
        if sha256_of_file(Path(place) / "manifest.json") == trained.provenance.get(name):
            return Path(place)
    return None


def _model_of_keys(config: Config, trained: TrainedMemory) -> str:
    keys = _input_of_training(config.checkpoint, "keys", trained)
    flags = read_json(keys / "run.json").get("config", {}) if keys is not None and (keys / "run.json").is_file() else {}
    if not flags.get("model"):
        raise UserError(f"--model is needed: the keys that --checkpoint {config.checkpoint} was trained from are not at hand "
                        "to say which base it belongs to")
    return str(flags["model"])


def _load_tokenizer(config: Config, model: str, corpus: Path | None, trained: TrainedMemory) -> Any:
    """The first of --tokenizer, the base's and the corpus's; it must have the memory's vocabulary."""
    if config.tokenizer is not None:
        name, flag = config.tokenizer, "--tokenizer"
    elif _has_tokenizer(model):
        name, flag = model, "the tokenizer of --model"
    elif corpus is not None:
        name, flag = str(corpus / "tokenizer"), "the corpus's tokenizer"
    else:
        raise UserError(f"--model {model} has no tokenizer, and the corpus of --checkpoint {config.checkpoint} is not beside "
                        "it: give --tokenizer RUN/corpus/tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # each tokenizer library raises a family of its own
        raise UserError(f"{flag} {name} cannot be loaded ({str(error).splitlines()[0]}): give --tokenizer, a directory or "
                        "Hub name") from error
    found, wanted = vocabulary_sha256(tokenizer), trained.provenance["vocabulary_sha256"]
    if found != wanted:
        raise UserError(f"{flag} {name} has another vocabulary ({len(tokenizer)} tokens, {found[:12]}…) than the memory was "
                        f"trained with ({wanted[:12]}…): give --tokenizer RUN/corpus/tokenizer")
    return tokenizer


def _has_tokenizer(model: str) -> bool:
    """Whether a model comes with a tokenizer; a Hub name is taken to."""
    root = Path(model)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
    return not root.is_dir() or any((root / name).is_file() for name in names)


# The output


def _is_complete(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the export is there and whole; an export of ours with a damaged file is to be made again.

    Raises:
        UserError: the directory holds something else.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return False
    if not (output / EXPORT_FILE).is_file():
        raise UserError(f"--output {output} is not empty and holds no export: choose a new directory or empty it")
    found = read_json(output / EXPORT_FILE)
    if differences := [f"{name} was {_at(found, name)!r}, now {_at(identity, name)!r}"
                       for name in ("format", "version", "inputs", "config") if _at(found, name) != _at(identity, name)]:
        raise UserError(f"--output {output} already holds another export ({'; '.join(differences)}): choose another --output, "
                        "or remove it")
    faults = [fault for entry in found["files"] if (fault := fault_of_file(output, FileRecord(**entry)))]
    if faults:
        _logger.warning("%s: making the export again", faults[0])
    return not faults


def _at(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, Mapping) else None


def _require_disk(config: Config, inputs: _Inputs) -> None:
    size = torch.empty(0, dtype=DTYPES[config.dtype]).element_size()
    root = Path(inputs.model)
    base = sum(path.stat().st_size for path in (*root.glob("*.safetensors"), *root.glob("*.bin"))) if root.is_dir() else 0
    require_free_bytes(config.output, base + size * inputs.memory.num_parameters(), what="the export's weights")


@contextmanager
def _partial_directory(output: Path) -> Iterator[Path]:
    """A new directory beside `output`, removed on leaving; those of dead processes of this host go first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = f".{output.name}.{socket.gethostname()}.", ".partial"
    for path in output.parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            pid = path.name[len(prefix) : -len(suffix)]
            if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
                shutil.rmtree(path)
    partial = output.parent / f"{prefix}{os.getpid()}{suffix}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _publish(export: Path, output: Path, *, aside: Path) -> None:
    """Flush every file and rename the directory to `output`; a damaged export there is moved `aside` first."""
    for path in (*_files_below(export), *(path for path in export.rglob("*") if path.is_dir()), export):
        _flush(path)
    if output.is_dir() and any(output.iterdir()):
        os.replace(output, aside)
    os.replace(export, output)
    _flush(output.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The model


def _build(config: Config, inputs: _Inputs) -> _Built:
    """Join the parts in the export's dtype, and read what they give.

    Raises:
        UserError: base and memory do not fit each other, or the dtype cannot hold them.
    """
    point = CapturePoint(layer=inputs.trained.provenance["input_layer"], point=inputs.trained.provenance["key_point"])
    joint = _join(config, inputs, point)
    probe = _read_parts(joint.base, joint.memory, point)
    rounding = 0.0 if config.dtype == "float32" else _rounding(config, inputs, point, probe)
    return _Built(joint=joint, probe=probe, rounding=rounding)


def _write_and_verify(config: Config, inputs: _Inputs, built: _Built, export: Path) -> dict[str, Any]:
    """Write the joint model and its tokenizer into `export`, load them again, and return the figures of the comparison.

    Raises:
        DamagedDataError: what was loaded is not what was trained.
    """
    weights = {f"memory.{name}": tensor.to(DTYPES[config.dtype]) for name, tensor in inputs.trained.weights.items()}
    expected = {**built.joint.state_dict(), **weights}
    built.joint.save_pretrained(export, max_shard_size=int(config.max_shard_gigabytes * 1e9))
    inputs.tokenizer.save_pretrained(export)
    for path in export.glob("*.safetensors"):  # safetensors writes them for the owner alone
        shutil.copymode(export / "config.json", path)
    difference = verify(export, expected, built.probe, inputs.lmbda, attention=config.attention)
    if vocabulary_sha256(AutoTokenizer.from_pretrained(export)) != inputs.trained.provenance["vocabulary_sha256"]:
        raise DamagedDataError("the tokenizer does not survive being saved and loaded: nothing was published; give another "
                               "form of it with --tokenizer")
    return {"logit_difference": difference, "logit_bound": LOGIT_BOUND, "rounding": built.rounding,
            "rounding_bound": ROUNDING_BOUND, "num_positions": built.probe.ids_BS.numel()}


def _weight_bytes(export: Path) -> int:
    return sum(path.stat().st_size for path in export.glob("*.safetensors"))


def _join(config: Config, inputs: _Inputs, point: CapturePoint) -> MemoryAugmentedLM:
    base = _load_base(config, inputs, config.dtype)
    try:
        joint = MemoryAugmentedLM.from_parts(
            base, _build_memory(inputs, config.dtype), lmbda=inputs.lmbda, input_point=point,
            provenance=inputs.trained.provenance, vocabulary_sha256=inputs.trained.provenance["vocabulary_sha256"],
        )
    except ValueError as error:
        raise UserError(f"--model {inputs.model} and --checkpoint {config.checkpoint} do not fit: {error}") from error
    generation: Any = joint.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = inputs.tokenizer.eos_token_id
    if generation.pad_token_id is None:
        padding = inputs.tokenizer.pad_token_id
        generation.pad_token_id = inputs.tokenizer.eos_token_id if padding is None else padding
    return joint


def _load_base(config: Config, inputs: _Inputs, dtype: str) -> Any:
    try:
        return load_base(inputs.model, dtype=DTYPES[dtype], device="cpu", attention=config.attention)
    except ValueError as error:
        raise UserError(f"--model {inputs.model}: {error}") from error


def _build_memory(inputs: _Inputs, dtype: str) -> Memory:
    """The plain memory with the trained weights in this dtype."""
    with torch.device("meta"):
        memory = Memory(inputs.memory)
    try:
        memory.load_state_dict({name: tensor.to(DTYPES[dtype]) for name, tensor in inputs.trained.weights.items()}, assign=True)
    except RuntimeError as error:
        raise DamagedDataError(f"the weights of --checkpoint do not fit their own configuration ({error}): run launch/train.py "
                               "again") from error
    return memory.eval().requires_grad_(False)


@torch.no_grad()
def _read_parts(base: Any, memory: Memory, point: CapturePoint) -> _Probe:
    """Both parts on random tokens, without the joint model: the base's logits, and the plain memory on a captured state."""
    text = base.config.get_text_config(decoder=True)
    num_sequences, num_tokens = _PROBE_SHAPE
    num_tokens = min(num_tokens, getattr(text, "max_position_embeddings", None) or num_tokens)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(text.vocab_size, (num_sequences, num_tokens), generator=generator)
    with capture(base, [point]).recording(num_sequences, num_tokens) as states:
        base_logits_BSV = base(input_ids=ids_BS, use_cache=False).logits
    memory_logits_BSV = memory.head(memory(states[point].to(memory.head.weight.dtype)))  # type: ignore[arg-type]
    return _Probe(ids_BS=ids_BS, base_BSV=base_logits_BSV.double().log_softmax(-1),
                  memory_BSV=memory_logits_BSV.double().log_softmax(-1))


def _rounding(config: Config, inputs: _Inputs, point: CapturePoint, probe: _Probe) -> float:
    """Mean total variation between the mixture of the rounded parts and that of the parts in float32."""
    exact = _read_parts(_load_base(config, inputs, "float32"), _build_memory(inputs, "float32"), point)
    pair = (parts.mixture_BSV(inputs.lmbda).exp() for parts in (exact, probe))
    variation = float(torch.sub(*pair).abs().sum(-1).mean() / 2)
    if not variation <= ROUNDING_BOUND:  # not a number, too
        raise UserError(f"--dtype {config.dtype} changes the model's distributions by {variation:.3g} (total variation; at most "
                        f"{ROUNDING_BOUND} is accepted): it cannot hold this model; choose bfloat16 or float32")
    return variation


@torch.no_grad()
def verify(export: Path, expected: Mapping[str, torch.Tensor], probe: _Probe, lmbda: float, *, attention: str) -> float:
    """Load an export through its own code files and compare it with what it was made from.

    Every tensor must be equal, bit for bit; log-probabilities at λ = 0, the export's λ and 1 within `LOGIT_BOUND`.

    Returns:
        the largest difference of log-probabilities, over the largest log-probability.

    Raises:
        DamagedDataError: says what differs.
    """
    # AutoModelForCausalLM would take this package's classes here, which outsiders do not have.
    reference = json.loads((export / "config.json").read_bytes())["auto_map"]["AutoModelForCausalLM"]
    try:
        model_class: Any = get_class_from_dynamic_module(reference, str(export))
        loaded, report = model_class.from_pretrained(
            export, dtype="auto", attn_implementation=attention, output_loading_info=True
        )
    except Exception as error:  # whatever is raised while code and weights are loaded: it does not load
        raise _refusal(f"it does not load ({type(error).__name__}: {error})") from error
    if faults := {name: sorted(map(str, values)) for name, values in report.items() if values}:
        raise _refusal(f"transformers reports {faults}")
    if loaded.lmbda != lmbda:
        raise _refusal(f"its λ is {loaded.lmbda:g}, not {lmbda:g}")
    found = loaded.state_dict()
    differing = sorted(name for name in {*found, *expected}
                       if name not in found or name not in expected or not _same(found[name], expected[name]))
    if differing:
        raise _refusal(f"{len(differing)} tensors differ, the first is {differing[0]}")
    worst = 0.0
    for value in dict.fromkeys((0.0, lmbda, 1.0)):
        loaded.lmbda = value
        logits_BSV = loaded(input_ids=probe.ids_BS, use_cache=False).logits
        difference = _relative_difference(logits_BSV.double().log_softmax(-1), probe.mixture_BSV(value))
        if not difference <= LOGIT_BOUND:
            raise _refusal(f"log-probabilities at λ = {value:g} differ by {difference:.2g} relative, more than {LOGIT_BOUND:g}")
        worst = max(worst, difference)
    return worst


def _refusal(reason: str) -> DamagedDataError:
    return DamagedDataError(f"the written model is not the trained one: {reason}. Nothing was published: run the same command "
                            "again; if this repeats, check the disk, and the version of transformers against requirements.txt")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _relative_difference(found_BSV: torch.Tensor, wanted_BSV: torch.Tensor) -> float:
    """max |found - wanted| / max |wanted|; infinities must be equal. NaN where either has one."""
    difference_BSV = torch.where(found_BSV == wanted_BSV, 0.0, found_BSV - wanted_BSV).abs()
    return float(difference_BSV.max() / wanted_BSV[wanted_BSV.isfinite()].abs().max())


# The card


def model_card(
    inputs: _Inputs, config: Config, verification: Mapping[str, Any], num_base_parameters: int, weight_bytes: int
) -> str:
    """README.md of the export, from what is known; what is not known is said to be unknown."""
    base = inputs.model if not Path(inputs.model).is_dir() else Path(inputs.model).resolve().name
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [mlp-memory, retrieval-imitation]"]
    if not Path(inputs.model).is_dir():
        header.append(f"base_model: {base}")
    example = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "# trust_remote_code runs hf.py, memory.py and backbone.py of this directory; transformers reads the tokenizer's\n"
        "# directory through the same configuration class, and would ask without it.\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)\n'
        'prompt = tokenizer("…", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))\n"
        "model.lmbda = 0.0  # the base alone; any weight in [0, 1]"
    )
    verified = _said(verification)
    sections = [
        "---\n" + "\n".join(header) + "\n---",
        f"# {base} with an MLP memory",
        "A frozen causal language model (the base) and a token-wise MLP (the memory) that was trained to give the next-token "
        "distribution of a kNN retriever over a corpus (arXiv 2508.01832): `p = (1 - λ) p_base + λ p_memory`. No index and no "
        "search are needed; the logits are log-probabilities of the mixture.",
        f"```python\n{example}\n```",
        "## What it is made of\n" + _bullet_list([
            f"Base: {base}, {num_base_parameters:,} parameters, frozen (SHA-256 of its files {inputs.base_sha256})",
            f"Weights: {config.dtype}, {weight_bytes:,} bytes",
            *_ingredients(inputs),
        ]),
        "## How good it is\n" + _quality(inputs),
        f"## Verification\n{verified[0].upper()}{verified[1:]}. `{EXPORT_FILE}` has the SHA-256 of every file.",
        "## Limits\n" + _bullet_list([
            "Not for decisions about people, nor for medical, legal, financial or safety-critical advice: it says what is "
            "likely in its corpus, not what is true, and names no source.",
            "Memorisation: the memory was trained to recall its corpus, and may give back passages of it word for word, personal "
            "data, secrets and licensed text included. Publish it only where the corpus itself might be published.",
            "The licences of the base and of the corpus apply; this card does not know them.",
            "Facts are as old as the corpus. The figures above hold for text like it; elsewhere the memory may make the base "
            "worse, which a smaller `lmbda` limits.",
        ]),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _ingredients(inputs: _Inputs) -> list[str]:
    """The memory, its weight, its corpus and its training, a line each."""
    known, memory, corpus, targets = inputs.trained.provenance, inputs.memory, inputs.corpus, inputs.targets
    lines = [
        f"Memory: {memory.num_parameters():,} parameters, {memory.num_blocks} {memory.family} blocks of width "
        f"{memory.hidden_size} ({memory.intermediate_size} inside), vocabulary {memory.vocab_size:,}; it reads the base's layer "
        f"{known['input_layer']} ({known['key_point']})",
        f"λ: {inputs.lmbda:g} ({inputs.lmbda_rule})",
        f"Corpus: {_tokens(corpus)} (SHA-256 of its manifest {known.get('corpus', 'unknown')})",
        f"Training: α {known.get('alpha', 'unknown')} (weight of KL against the retriever; 1 - α of cross entropy, "
        f"{known.get('ce_through', 'unknown')}), {known.get('steps', 'unknown')} steps of "
        f"{known.get('batch_positions', 'unknown')} positions, {known.get('epochs', 'unknown')} epochs",
    ]
    if known.get("alpha") == 0:
        return [*lines, "Retriever: none (trained on cross entropy alone)"]
    if targets is None:
        sha256 = known.get("targets", "unknown")
        return [*lines, f"Retriever: unknown k and temperature (SHA-256 of its targets' manifest {sha256})"]
    return [*lines, f"Retriever: k {targets['k']}, T {targets['temperature']:.6g} in squared key units "
                    f"({targets.get('search', 'unknown')} search, excluded: {targets.get('exclude', 'unknown')}), keys of layer "
                    f"{known.get('key_layer', 'unknown')}"]


def _tokens(corpus: Mapping[str, Any] | None) -> str:
    if corpus is None:
        return "unknown number of tokens"
    train = corpus["splits"]["train"]
    return f"{train['num_tokens']:,} training tokens of {train['num_documents']:,} documents"


def _quality(inputs: _Inputs) -> str:
    if inputs.report is None:
        return "Not measured: the export was made without a report of `launch/evaluate.py`."
    rows = ["| arm | test perplexity | change from the base (95 % interval) | λ |", "|---|---|---|---|"]
    for arm in inputs.report["arms"]:
        change, interval, lmbda = arm.get("ppl_change"), arm.get("ppl_interval"), arm.get("lambda")
        shown = "" if change is None or not interval else f"{change:+.1%} ({interval[0]:+.1%} to {interval[1]:+.1%})"
        rows.append(f"| {arm['name']} | {arm['ppl']:.2f} | {shown} | {'' if lmbda is None else f'{lmbda:g}'} |")
    return "\n".join(rows) + "\n\nλ was chosen on a tuning split; the figures are of the test split, at each arm's own λ."


def _said(verification: Mapping[str, Any]) -> str:
    """The verification in one sentence."""
    text = (f"loaded again through its own code, every tensor is the trained one in its dtype, and log-probabilities on "
            f"{verification['num_positions']} random tokens differ from those of base and memory by "
            f"{verification['logit_difference']:.1g} relative (bound {verification['logit_bound']:g})")
    if verification["rounding"]:
        text += (f"; against float32 the distributions change by {verification['rounding']:.2g} "
                 f"(mean total variation, bound {verification['rounding_bound']:g})")
    return text


def _bullet_list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)

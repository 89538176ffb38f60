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
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import mlpmem_ds
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import (
    FileRecord,
    canonical_json,
    fault_of_file,
    flush,
    is_alive,
    read_json,
    record_file,
)
from mlpmem_ds.core.stage_directory import require_free_bytes
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import DTYPES
from mlpmem_ds.maths.interpolation import interpolate
from mlpmem_ds.models.backbone import CapturePoint, capture, load_base
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.stages.export_inputs import EXPORT_FILE, Config, ExportInputs, open_inputs
from mlpmem_ds.stages.model_card import describe_verification, model_card
from mlpmem_ds.stages.prepare_corpus import vocabulary_sha256

_logger = logging.getLogger(__name__)
# The loaded model and its parts do the same operations on the same numbers: what is left is float32 against float64 in
# the softmax and the mixture. Largest difference of log-probabilities over the largest log-probability; for every dtype.
LOGIT_BOUND = 1e-6
# A 16-bit export against float32: mean total variation of the next-token distributions. Rounding costs about 1e-2; more
# than this is an overflow or a base that the dtype cannot hold.
ROUNDING_BOUND = 0.1
_PROBE_SHAPE = (4, 32)


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
    inputs, output = open_inputs(config), config.output.resolve()
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
        manifest = {
            **identity,
            "mlpmem_ds": mlpmem_ds.__version__,
            "verification": verification,
            "files": [record.to_json() for record in records],
        }
        (export / EXPORT_FILE).write_bytes(canonical_json(manifest))
        _publish(export, output, aside=partial / "replaced")
    _logger.info(
        "complete: %s (λ %g, %s): %s", config.output, inputs.lmbda, config.dtype, describe_verification(verification)
    )


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
    if differences := [
        f"{name} was {_at(found, name)!r}, now {_at(identity, name)!r}"
        for name in ("format", "version", "inputs", "config")
        if _at(found, name) != _at(identity, name)
    ]:
        raise UserError(
            f"--output {output} already holds another export ({'; '.join(differences)}): choose another --output, "
            "or remove it"
        )
    faults = [fault for entry in found["files"] if (fault := fault_of_file(output, FileRecord(**entry)))]
    if faults:
        _logger.warning("%s: making the export again", faults[0])
    return not faults


def _at(values: Any, name: str) -> Any:
    return values.get(name) if isinstance(values, Mapping) else None


def _require_disk(config: Config, inputs: ExportInputs) -> None:
    size = torch.empty(0, dtype=DTYPES[config.dtype]).element_size()
    root = Path(inputs.model)
    base = (
        sum(path.stat().st_size for path in (*root.glob("*.safetensors"), *root.glob("*.bin"))) if root.is_dir() else 0
    )
    require_free_bytes(config.output, base + size * inputs.memory.num_parameters(), what="the export's weights")


@contextmanager
def _partial_directory(output: Path) -> Iterator[Path]:
    """A new directory beside `output`, removed on leaving; those of dead processes of this host go first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = f".{output.name}.{socket.gethostname()}.", ".partial"
    for path in output.parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            pid = path.name[len(prefix) : -len(suffix)]
            if pid.isdigit() and (int(pid) == os.getpid() or not is_alive(int(pid))):
                shutil.rmtree(path)
    partial = output.parent / f"{prefix}{os.getpid()}{suffix}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _publish(export: Path, output: Path, *, aside: Path) -> None:
    """Flush every file and rename the directory to `output`; a damaged export there is moved `aside` first."""
    for path in (*_files_below(export), *(path for path in export.rglob("*") if path.is_dir()), export):
        flush(path)
    if output.is_dir() and any(output.iterdir()):
        os.replace(output, aside)
    os.replace(export, output)
    flush(output.parent)


# The model


def _build(config: Config, inputs: ExportInputs) -> _Built:
    """Join the parts in the export's dtype, and read what they give.

    Raises:
        UserError: base and memory do not fit each other, or the dtype cannot hold them.
    """
    point = CapturePoint(layer=inputs.trained.provenance["input_layer"], point=inputs.trained.provenance["key_point"])
    joint = _join(config, inputs, point)
    probe = _read_parts(joint.base, joint.memory, point)
    rounding = 0.0 if config.dtype == "float32" else _rounding(config, inputs, point, probe)
    return _Built(joint=joint, probe=probe, rounding=rounding)


def _write_and_verify(config: Config, inputs: ExportInputs, built: _Built, export: Path) -> dict[str, Any]:
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
        raise DamagedDataError(
            "the tokenizer does not survive being saved and loaded: nothing was published; give another "
            "form of it with --tokenizer"
        )
    return {
        "logit_difference": difference,
        "logit_bound": LOGIT_BOUND,
        "rounding": built.rounding,
        "rounding_bound": ROUNDING_BOUND,
        "num_positions": built.probe.ids_BS.numel(),
    }


def _weight_bytes(export: Path) -> int:
    return sum(path.stat().st_size for path in export.glob("*.safetensors"))


def _join(config: Config, inputs: ExportInputs, point: CapturePoint) -> MemoryAugmentedLM:
    base = _load_base(config, inputs, config.dtype)
    try:
        joint = MemoryAugmentedLM.from_parts(
            base,
            _build_memory(inputs, config.dtype),
            lmbda=inputs.lmbda,
            input_point=point,
            provenance=inputs.trained.provenance,
            vocabulary_sha256=inputs.trained.provenance["vocabulary_sha256"],
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


def _load_base(config: Config, inputs: ExportInputs, dtype: str) -> Any:
    try:
        return load_base(inputs.model, dtype=DTYPES[dtype], device="cpu", attention=config.attention)
    except ValueError as error:
        raise UserError(f"--model {inputs.model}: {error}") from error


def _build_memory(inputs: ExportInputs, dtype: str) -> Memory:
    """The plain memory with the trained weights in this dtype."""
    with torch.device("meta"):
        memory = Memory(inputs.memory)
    try:
        memory.load_state_dict(
            {name: tensor.to(DTYPES[dtype]) for name, tensor in inputs.trained.weights.items()}, assign=True
        )
    except RuntimeError as error:
        raise DamagedDataError(
            f"the weights of --checkpoint do not fit their own configuration ({error}): run launch/train.py again"
        ) from error
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
    return _Probe(
        ids_BS=ids_BS,
        base_BSV=base_logits_BSV.double().log_softmax(-1),
        memory_BSV=memory_logits_BSV.double().log_softmax(-1),
    )


def _rounding(config: Config, inputs: ExportInputs, point: CapturePoint, probe: _Probe) -> float:
    """Mean total variation between the mixture of the rounded parts and that of the parts in float32."""
    exact = _read_parts(_load_base(config, inputs, "float32"), _build_memory(inputs, "float32"), point)
    pair = (parts.mixture_BSV(inputs.lmbda).exp() for parts in (exact, probe))
    variation = float(torch.sub(*pair).abs().sum(-1).mean() / 2)
    if not variation <= ROUNDING_BOUND:  # not a number, too
        raise UserError(
            f"--dtype {config.dtype} changes the model's distributions by {variation:.3g} (total variation; at most "
            f"{ROUNDING_BOUND} is accepted): it cannot hold this model; choose bfloat16 or float32"
        )
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
    differing = sorted(
        name
        for name in {*found, *expected}
        if name not in found or name not in expected or not _same(found[name], expected[name])
    )
    if differing:
        raise _refusal(f"{len(differing)} tensors differ, the first is {differing[0]}")
    worst = 0.0
    for value in dict.fromkeys((0.0, lmbda, 1.0)):
        loaded.lmbda = value
        logits_BSV = loaded(input_ids=probe.ids_BS, use_cache=False).logits
        difference = _relative_difference(logits_BSV.double().log_softmax(-1), probe.mixture_BSV(value))
        if not difference <= LOGIT_BOUND:
            raise _refusal(
                f"log-probabilities at λ = {value:g} differ by {difference:.2g} relative, more than {LOGIT_BOUND:g}"
            )
        worst = max(worst, difference)
    return worst


def _refusal(reason: str) -> DamagedDataError:
    return DamagedDataError(
        f"the written model is not the trained one: {reason}. Nothing was published: run the same command "
        "again; if this repeats, check the disk, and the version of transformers against requirements.txt"
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _relative_difference(found_BSV: torch.Tensor, wanted_BSV: torch.Tensor) -> float:
    """max |found - wanted| / max |wanted|; infinities must be equal. NaN where either has one."""
    difference_BSV = torch.where(found_BSV == wanted_BSV, 0.0, found_BSV - wanted_BSV).abs()
    return float(difference_BSV.max() / wanted_BSV[wanted_BSV.isfinite()].abs().max())

"""`convert_checkpoint`: a memory and its base → one Hugging Face directory that loads without this package.

    OUTPUT/
      config.json, generation_config.json, model*.safetensors     the joint model, the base included
      hf.py, mixture.py, memory.py, …                             its code, for `trust_remote_code=True`
      tokenizer*.json, …                                          the corpus's vocabulary
      README.md                                                   the model card
      mlpmem_export.json                                          format, inputs, verification, every file's
                                                                  checksum

All of it is written into `.OUTPUT.<host>.<boot>.<pid>-<start>.partial/` next to OUTPUT, loaded again through
its own code, compared with the base and the memory as trained (check.py), flushed, and only then renamed.
What a killed run of the same export left is continued shard by shard; of another, removed. Weights stay in
their files until they are written: one tensor at a time is in memory, not the model.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save

import mlpmem_ds
from mlpmem_ds.core.directories import (
    bytes_of_stale_work,
    put_back_former,
    refuse_mount,
    replace_directory,
    work_directory,
)
from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.file_lists import records_in
from mlpmem_ds.core.files import (
    FileRecord,
    fault_of_file,
    publish_json,
    read_json,
    read_sealed_json,
    record_file,
    require_free_bytes,
    sealed_json,
)
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import DTYPES
from mlpmem_ds.engines.model_files import GENERATION_FILE
from mlpmem_ds.formats.corpus import vocabulary_sha256
from mlpmem_ds.formats.model_directory import fault_of
from mlpmem_ds.formats.weight_shards import Weight, write_weights_in_shards
from mlpmem_ds.models.base_loading import attention_of, load_base
from mlpmem_ds.models.generation_settings import choosing_settings
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.joint_parts import input_points
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.quantized_base import method_of
from mlpmem_ds.stages.conversion.check import (
    LOGIT_BOUND,
    compare_logits,
    load_export,
    read_parts,
    total_variation,
)
from mlpmem_ds.stages.conversion.config import Config
from mlpmem_ds.stages.conversion.identity import differences_of, is_card_known
from mlpmem_ds.stages.conversion.import_reference import write_memory
from mlpmem_ds.stages.conversion.inputs import (
    BASE_CARD,
    EXPORT_FILE,
    ExportInputs,
    open_inputs,
    with_weights_read,
)
from mlpmem_ds.stages.conversion.joining import join_parts
from mlpmem_ds.stages.conversion.model_card import (
    describe_verification,
    facts_from_base,
    model_card,
    warn_of_unread_card,
)
from mlpmem_ds.stages.conversion.thresholds import warn_of_fixed_weights

_logger = logging.getLogger(__name__)
_IDENTITY, _RECORDS = "identity.json", "shards"
# A 16-bit export against the parts as they are stored: mean total variation of the next-token distributions.
# Rounding costs about 1e-2; more than this is an overflow or a base that the dtype cannot hold.
ROUNDING_BOUND = 0.1


def run(config: Config, world: World) -> None:
    """Write, verify and publish the export, or say that it is complete. One process does it; other ranks
    return."""
    if not world.is_first:
        return
    inputs, output = open_inputs(config), config.output.resolve()
    if config.write == "memory":
        write_memory(config, inputs.trained, lambda: with_weights_read(inputs, output).trained, world)
        return
    base_facts = facts_from_base(inputs, config)
    identity = inputs.identity(config, base_facts)
    refuse_mount(output, flag="--output")
    put_back_former(output)
    if _is_complete(output, identity):
        _logger.info("complete: %s", config.output)
        return
    warn_of_unread_card(inputs, config, base_facts)
    inputs = with_weights_read(inputs, output)
    joint = _join(config, inputs)
    weights = _weights_of(joint, DTYPES[config.dtype])
    _require_disk(output, weights)
    with work_directory(output, continues=lambda path: _is_of(path, identity)) as partial:
        (partial / _RECORDS).mkdir(exist_ok=True)
        publish_json(partial / _IDENTITY, identity)
        export = partial / output.name  # transformers names its copy of the code after this directory
        export.mkdir(exist_ok=True)
        verification = _write_and_verify(config, inputs, joint, weights, export, world)
        num_base_parameters = sum(parameter.numel() for parameter in joint.base.parameters())
        card = model_card(
            inputs, config, base_facts, verification, num_base_parameters, _weight_bytes(export)
        )
        (export / "README.md").write_text(card, encoding="utf-8")
        # Weights were hashed when they were written, and have been loaded and compared since.
        shards = {path.stem: FileRecord(**read_json(path)) for path in (partial / _RECORDS).glob("*.json")}
        names = [path.relative_to(export).as_posix() for path in _files_below(export)]
        manifest = {
            **identity,
            "mlpmem_ds": mlpmem_ds.__version__,
            "verification": verification,
            "files": [(shards.get(name) or record_file(export, name)).to_json() for name in names],
        }
        (export / EXPORT_FILE).write_bytes(sealed_json(manifest))
        replace_directory(output, export)
    _logger.info(
        "complete: %s (λ %g, %s): %s",
        config.output,
        inputs.lmbda,
        config.dtype,
        describe_verification(verification),
    )


# The output


def _is_complete(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the export exists and is whole; one with a damaged file is made again.

    Raises:
        UserError: the directory holds something else.
        DamagedDataError: it holds an export that cannot say which it is.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a directory")
    if not output.is_dir() or not any(output.iterdir()):
        return False
    if not (output / EXPORT_FILE).is_file():
        raise UserError(
            f"--output {output} is not empty and holds no export: choose a new directory or empty it"
        )
    path = output / EXPORT_FILE
    try:
        found = read_sealed_json(path)
        records = records_in(found, path)
    except DamagedDataError as error:
        raise DamagedDataError(
            f"--output {output} holds an export, and its {EXPORT_FILE}, which says of what, is damaged:"
            " remove the directory and give the same command again, or choose another --output"
        ) from error
    if differences := differences_of(found, identity):
        raise UserError(
            f"--output {output} already holds another export ({'; '.join(differences)}): choose another"
            " --output, or remove it"
        )
    faults = [fault for record in records if (fault := fault_of_file(output, record))]
    if faults:
        _logger.warning("%s: making the export again", faults[0])
    elif not is_card_known(found) and identity["config"].get(BASE_CARD):
        _logger.warning(
            "%s was made when the model card of the base could not be read, as without the network, and its"
            " own lacks the licence and languages from there: remove it and run this again, to have them",
            output,
        )
    return not faults


def _require_disk(output: Path, weights: Mapping[str, Weight]) -> None:
    """Before anything is written: refuse a disk that cannot hold what the shards of killed runs lack.

    Raises:
        UserError: with both numbers.
    """
    needed = sum(weight.num_bytes for weight in weights.values())
    require_free_bytes(output, needed - bytes_of_stale_work(output), what="the export's weights")


def _is_of(partial: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a killed run of the same export left the directory; its card is written at the end."""
    try:
        return not differences_of(read_json(partial / _IDENTITY), identity)
    except DamagedDataError:
        return False


def _files_below(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


# The model


def _write_and_verify(
    config: Config,
    inputs: ExportInputs,
    joint: MemoryAugmentedLM,
    weights: Mapping[str, Weight],
    export: Path,
    world: World,
) -> dict[str, Any]:
    """Write the joint model, whose tensors as written are `weights`, and its tokenizer into `export`, load
    them again, and return how they compare.

    Raises:
        UserError: the dtype cannot hold the model.
        DamagedDataError: what was loaded is not what was trained.
    """
    dtype, gate = DTYPES[config.dtype], joint.gate
    points = input_points(joint.config, joint.base)  # type: ignore[arg-type]
    layers_path = inputs.trained.provenance.input_layers_path
    as_stored = (
        None
        if config.dtype == "float32"
        else read_parts(joint.base, joint.memories, points, gate, layers_path=layers_path)
    )
    num_bytes = sum(weight.num_bytes for weight in weights.values())
    progress = Progress(num_bytes, label="weights", unit="bytes", world=world)
    max_bytes, records = int(config.max_shard_gigabytes * 1e9), export.parent / _RECORDS
    write_weights_in_shards(export, weights, max_bytes=max_bytes, records=records, progress=progress.advance)
    progress.close()
    write_description(joint, inputs.tokenizer, dtype, export)
    loaded = load_export(export, weights, inputs.lmbda, attention=attention_of(joint.base))
    probe = read_parts(*_parts_in_dtype(joint, loaded, dtype), points, gate, layers_path=layers_path)
    rounding = 0.0 if as_stored is None else total_variation(as_stored, probe, gate)
    if not rounding <= ROUNDING_BOUND:  # not a number, too
        raise UserError(
            f"--dtype {config.dtype} changes the model's distributions by {rounding:.3g} (total variation; at"
            f" most {ROUNDING_BOUND} is accepted): it cannot hold this model; choose bfloat16 or float32"
        )
    difference = compare_logits(loaded, probe, gate, inputs.lmbda)
    if (
        vocabulary_sha256(AutoTokenizer.from_pretrained(export))
        != inputs.trained.provenance.vocabulary_sha256
    ):
        raise DamagedDataError(
            "the tokenizer does not survive being saved and loaded: nothing was published; give another "
            "form of it with --tokenizer"
        )
    return {
        "logit_difference": difference,
        "logit_bound": LOGIT_BOUND,
        "rounding": rounding,
        "rounding_bound": ROUNDING_BOUND,
        "num_positions": probe.ids_BS.numel(),
    }


def _weights_of(joint: MemoryAugmentedLM, dtype: torch.dtype) -> dict[str, Weight]:
    """The tensors to write: floats in `dtype`; of tied tensors only the source."""
    state = joint.state_dict()
    tied = {
        name
        for name, source in joint.all_tied_weights_keys.items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }

    def weight(name: str, tensor: torch.Tensor) -> Weight:
        # A gate's weights are few, and stay float32.
        is_rounded = tensor.is_floating_point() and not name.startswith("gate.")
        stored = dtype if is_rounded else tensor.dtype
        return Weight(shape=tuple(tensor.shape), dtype=stored, read=lambda: tensor.to(stored))

    return {name: weight(name, tensor) for name, tensor in state.items() if name not in tied}


def write_description(joint: MemoryAugmentedLM, tokenizer: Any, dtype: torch.dtype, export: Path) -> None:
    """Everything but the weights: configuration, code, generation settings and tokenizer."""
    config: Any = copy.deepcopy(joint.config)
    config.architectures = [type(joint).__name__]
    for part in (config, config.base_config):
        part.dtype = dtype
    if Path(config.base_config._name_or_path).exists():  # a directory of this machine says nothing elsewhere
        config.base_config._name_or_path = ""
    custom_object_save(joint, export, config=config)
    config.save_pretrained(export)
    # Not save_pretrained: what it loads, such as a temperature without do_sample, it refuses to save.
    settings: Any = joint.generation_config
    settings.to_json_file(export / GENERATION_FILE, use_diff=True, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(export)
    for path in export.glob("*.safetensors"):
        shutil.copymode(export / "config.json", path)


def _parts_in_dtype(
    joint: MemoryAugmentedLM, loaded: Any, dtype: torch.dtype
) -> tuple[Any, tuple[Memory, ...]]:
    """Base and memories with the written numbers: the trained tensors if they have `dtype`, else the loaded
    ones.

    The loaded tensors were found equal to the rounded trained ones, and are mapped from the files. Modules
    and settings stay those of the given base, and nothing is copied.
    """
    base = joint.base
    if any(parameter.dtype != dtype for parameter in base.parameters()):
        base.load_state_dict(loaded.base.state_dict(), assign=True)
        base.tie_weights()
    for memory, written in zip(joint.memories, loaded.memories, strict=True):
        if any(parameter.dtype != dtype for parameter in memory.parameters()):
            memory.load_state_dict(written.state_dict(), assign=True)
    return base, joint.memories


def _weight_bytes(export: Path) -> int:
    return sum(path.stat().st_size for path in export.glob("*.safetensors"))


def _join(config: Config, inputs: ExportInputs) -> MemoryAugmentedLM:
    """Join the parts in the dtypes in which they are stored, so that they stay in their files until read.

    Raises:
        UserError: they do not fit each other.
    """
    try:
        base = load_base(inputs.model, dtype="auto", device="cpu", attention=config.attention)
    except ValueError as error:
        raise UserError(f"--model {inputs.model}: {fault_of(inputs.model, error)}") from error
    if (quantized := getattr(base.config, "quantization_config", None)) is not None:
        raise UserError(
            f"--model {inputs.model} is quantized ({method_of(quantized)}), and an export holds floats:"
            " generate --model BASE --memory DIR joins them as they are; or extract keys with the float base,"
            " export that, and quantize it when it is loaded (generate --base-weights 4bit)"
        )
    flag = "--checkpoint" if config.checkpoint else "--from-reference"
    joint = join_parts(base, inputs, cast=False, threshold=config.base_only_threshold, flag=flag)
    warn_of_fixed_weights(config.base_only_threshold, [joint.gate], len(joint.memories))
    if choosing := choosing_settings(joint.generation_config):
        settings = ", ".join(f"{name} {value}" for name, value in choosing.items())
        _logger.info(
            "generation_config.json keeps the base's %s: transformers' `generate` follows it,"
            " launch/generate.py goes by its flags alone",
            settings,
        )
    return joint

"""Part of `convert_checkpoint` and `generate`: a loaded base and trained memories → the joint model."""

from __future__ import annotations

from transformers import PreTrainedModel

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.formats.trained_models import TrainedMemory
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.generation_settings import complete_settings
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.joint_parts import copied_gate
from mlpmem_ds.models.pretrained_memory import PretrainedMemory, build_memory
from mlpmem_ds.stages.conversion.gate_inputs import stored_gate
from mlpmem_ds.stages.conversion.inputs import ExportInputs


def join_parts(
    base: PreTrainedModel, inputs: ExportInputs, *, cast: bool, threshold: float | None, flag: str
) -> MemoryAugmentedLM:
    """The joint model, with its gate and its settings of generation.

    Args:
        cast: bring the memories to the base's dtype and device; else they stay in their files until read.
        threshold: the weight below which a memory is left out; None: never.
        flag: how messages name the memories.

    Raises:
        UserError: the parts do not fit each other.
    """
    try:
        memories = [_pretrained(trained) for trained in inputs.memories]
        joint = MemoryAugmentedLM.join(base, memories, lmbda=inputs.lmbda, cast=cast)
        if inputs.gate is not None:
            joint.set_gate(copied_gate(stored_gate(inputs.gate), base.device))
    except ValueError as error:
        raise UserError(f"--model {inputs.model} and {flag} {inputs.source} do not fit: {error}") from error
    joint.base_only_threshold = threshold
    joint.generation_config = complete_settings(
        joint.generation_config,
        base=base,
        tokenizer=inputs.tokenizer,
        num_rows=inputs.memory.vocab_size,
        further_ends=() if inputs.corpus is None else (inputs.corpus.tokenizer.end_of_document_id,),
    )
    return joint


def _pretrained(trained: TrainedMemory) -> PretrainedMemory:
    """The plain memory with the trained weights, as a joint model takes it."""
    try:
        memory = build_memory(trained.memory, trained.weights)
    except ValueError as error:
        raise DamagedDataError(
            f"the memory's weights do not fit their own configuration ({error}): run launch/train.py again"
        ) from error
    provenance = trained.provenance
    return PretrainedMemory(
        module=memory.eval().requires_grad_(False),
        **CapturePoint.of(provenance).settings(),
        vocabulary_sha256=provenance.vocabulary_sha256,
        provenance=to_json(provenance),
    )

"""Part of `train_base` and `train_baseline`: the model that is trained, new or an existing one, and how it is
written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.engines.model_files import check_model_reads, max_context_of
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.model_directory import fault_of
from mlpmem_ds.formats.weight_shards import WeightFiles
from mlpmem_ds.models.backbone import logit_transform
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.base.config import Config

MODULE_PREFIX = "model."
"""of a model's names inside a `NextTokenModule`"""


def new_gpt2(config: Config, corpus: CorpusSplit, length: int) -> PreTrainedModel:
    """A GPT-2-like model of the flags' shape, on the CPU, in float32; it reads sequences of `length`."""
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=corpus.vocab_size,
            n_positions=max(length, corpus.block_size) + len(corpus.begin_of_document_ids),
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            activation_function="gelu_pytorch_tanh",  # GPT-2's, as one kernel
            bos_token_id=corpus.end_of_document_id,
            eos_token_id=corpus.end_of_document_id,
            attn_implementation=fast_attention(),  # type: ignore[call-arg]
        )
    )


def load_model(
    name_or_path: str,
    splits: Sequence[CorpusSplit],
    length: int,
    device: torch.device,
    *,
    shared: Path | None,
) -> PreTrainedModel:
    """The model of --model on the device, in float32, all of it to be trained.

    Args:
        name_or_path: a directory or Hub name.
        splits: of the corpus, that are trained and validated on.
        length: tokens of a sequence.
        device: of its weights.
        shared: where several ranks keep what one of them computes.

    Raises:
        UserError: the model cannot be trained here, or cannot read sequences of this length of the corpus.
    """
    try:
        model = load_base(name_or_path, dtype=torch.float32, device=device, attention=fast_attention())
        weight_VD, bias_V = output_head(model)
        is_linear = bias_V is None and logit_transform(model).is_identity
    except ValueError as error:
        raise UserError(f"--model {name_or_path}: {fault_of(name_or_path, error)}") from error
    if not is_linear:
        raise UserError(
            f"--model {name_or_path}: its output head has a bias, a scale or a soft cap, which this trainer"
            " does not know: train it with its own tools"
        )
    context = max_context_of(model.config)
    check_model_reads(name_or_path, splits, vocab_size=len(weight_VD), max_context=context, shared=shared)
    longest = context - len(splits[0].begin_of_document_ids)
    if length > longest:
        raise UserError(
            f"--context {length} is more than the {longest} tokens that --model {name_or_path} reads:"
            f" choose at most {longest}"
        )
    return model.requires_grad_(True)


def fast_attention() -> str:
    """On a CPU in bfloat16 the fused attention is the slower one: 6.5k against 8.9k tokens/s of a 4-layer d
    256 model."""
    return "auto" if torch.cuda.is_available() else "eager"


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """The model's configuration as plain values, without the version of the library that runs it now."""
    values = json.loads(json.dumps(model.config.to_dict()))
    return {name: value for name, value in values.items() if name != "transformers_version"}


def write_model(
    writer: UnitWriter,
    files: WeightFiles,
    *,
    model: PreTrainedModel,
    corpus: CorpusSplit,
) -> dict[str, Any]:
    """Write float32 weights with configuration and tokenizer, in Hugging Face's layout.

    Args:
        writer: of the directory's one unit.
        files: of the weights, by their names inside a `NextTokenModule`; a tied one once.
        model: the trained model; takes the weights.
        corpus: whose tokenizer goes along.
    """
    model.float()
    model.load_state_dict(
        {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in files.read().items()}, strict=False
    )
    model.tie_weights()
    save_model(writer, model, corpus)
    return {"parameters": model.num_parameters()}


def save_model(writer: UnitWriter, model: PreTrainedModel, corpus: CorpusSplit) -> None:
    """Write a model's weights and configuration as they are, and the corpus's tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        writer.copy_folder(Path(scratch))
    writer.copy_folder(corpus.tokenizer_path)

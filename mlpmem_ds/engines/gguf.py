"""GGUF, llama.cpp's file of a model, read by transformers with the package `gguf`, and written as
`save_pretrained` does."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import is_gguf_available
from transformers.utils import logging as transformers_logging

from mlpmem_ds.core.errors import DamagedDataError, UserError, first_line

_logger = logging.getLogger(__name__)
_OF_THE_FILE = {
    "quantization_config", "architectures", "dtype", "torch_dtype", "transformers_version", "model_type",
    "_name_or_path", "_model_name_or_path",
}  # fmt: skip
_SENTENCES = (
    "The capital of France is Paris. Water boils at one hundred degrees, and it freezes at zero. The children"
    " went to school in the morning and walked home in the afternoon."
)
_BEGINNING, _NEW_TOKENS = "The capital of France is", 6


@dataclass(frozen=True, kw_only=True)
class ConvertedModel:
    """What a written model makes of English: `perplexity` of three plain sentences, `continuation` of the
    beginning of one, greedy."""

    num_parameters: int
    perplexity: float
    continuation: str


def require_gguf() -> None:
    """
    Raises:
        UserError: the package `gguf` is missing.
    """
    if not is_gguf_available():
        raise UserError(
            "reading a GGUF file needs the package gguf, which is not installed or too old: pip install"
            " 'gguf>=0.17'"
        )


def bytes_of_weights(path: Path) -> int:
    """What the weights of a GGUF file's model will take as bfloat16.

    Raises:
        UserError: the file is damaged, or the package `gguf` is missing.
    """
    require_gguf()
    from gguf import GGUFReader

    try:
        return sum(2 * int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except Exception as error:  # a family of errors, as when the model is read
        raise _damaged(path, error) from error


def convert_gguf(path: Path, output: Path) -> ConvertedModel:
    """Write a GGUF file's model as a Hugging Face directory: bfloat16 weights, tokenizer, configuration. What
    was written is read again and compared.

    Raises:
        UserError: the file is damaged, is of a kind that transformers does not read, or holds no tokenizer.
        DamagedDataError: what was written is not what was read.
    """
    require_gguf()
    with _quiet():
        read, tokenizer = _read(path)
        model: Any = _plain(read)
        model.to(torch.bfloat16)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        for weights in output.glob("*.safetensors"):
            weights.chmod(0o644)
        written = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16).eval()
        tokenizer = AutoTokenizer.from_pretrained(output)
    state, original = written.state_dict(), model.state_dict()
    if state.keys() != original.keys() or any(not torch.equal(state[name], original[name]) for name in state):
        raise DamagedDataError(f"{output}: the weights do not survive being saved and loaded")
    return _tried(written, tokenizer, path)


def _read(path: Path) -> tuple[PreTrainedModel, Any]:
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a family of errors for each way in which a file can be damaged
        raise _damaged(path, error) from error
    embeddings: Any = model.get_input_embeddings()
    num_rows = embeddings.weight.shape[0]
    if len(tokenizer) > num_rows:
        raise UserError(
            f"{path} has a tokenizer of {len(tokenizer):,} tokens and a model of {num_rows:,}: it is damaged,"
            " or not one model's"
        )
    return model, tokenizer


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read as a model ({type(error).__name__}: {first_line(error)}): it is damaged"
        " (download it again), or of a kind that transformers does not read from GGUF"
    )


def _plain(read: PreTrainedModel) -> PreTrainedModel:
    """The same model without the marks of its quantization, with which it could not be saved."""
    values = {name: value for name, value in read.config.to_dict().items() if name not in _OF_THE_FILE}
    config = type(read.config)(**values)
    model = type(read)(config).eval()
    found = model.load_state_dict(read.state_dict(), strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise UserError(
            "the file's model has other weights than its configuration says (missing"
            f" {found.missing_keys[:3]}, too many {found.unexpected_keys[:3]}): it is damaged"
        )
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model


def _tried(model: Any, tokenizer: Any, path: Path) -> ConvertedModel:
    """The model on English text; a warning where it knows none."""
    model = model.float()
    ids_S = tokenizer(_SENTENCES, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    with torch.inference_mode():
        logits_SV = model(ids_S[None]).logits[0]
        loss = float(torch.nn.functional.cross_entropy(logits_SV[:-1], ids_S[1:]))
        beginning = tokenizer(_BEGINNING, return_tensors="pt")
        said_S = model.generate(**beginning, max_new_tokens=_NEW_TOKENS, do_sample=False)[0]
    if not math.isfinite(loss):
        raise UserError(f"{path}: the model gives numbers that are not finite: the file is damaged")
    perplexity = math.exp(min(loss, 100.0))
    if perplexity > model.config.vocab_size / 2:
        _logger.warning(
            "%s: English text has perplexity %.3g, hardly better than chance: an untrained model, or one that"
            " was not read as it was meant",
            path, perplexity,
        )  # fmt: skip
    return ConvertedModel(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        perplexity=round(perplexity, 2),
        continuation=tokenizer.decode(said_S, skip_special_tokens=True),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings and progress bars, which know no other switch than their stream."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)

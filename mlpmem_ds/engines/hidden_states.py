"""The base's forward pass over a corpus: hidden states and label log-probabilities, position by position.

`StateSource` is the protocol that another engine has to meet: a batch of token blocks in, the wanted states and the
final hidden states' log-probabilities out. `TransformersSource` is the one we ship.

B windows, S tokens, D width, n positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers.utils import cached_file

from mlpmem_ds.core.blocks import Block, Window
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.maths.interpolation import label_log_probabilities
from mlpmem_ds.models.backbone import (
    CapturePoint,
    capture,
    decoder_layers,
    load_base,
    logit_transform,
    output_head,
    resolve_layer,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BatchStates:
    """What one batch of windows gives: named states [B, S, D] as float32 on the CPU, and the final ones on the device."""

    states: Mapping[str, torch.Tensor]
    final_BSD: torch.Tensor


class StateSource(Protocol):
    """An engine that runs a base."""

    num_layers: int
    width: int
    vocab_size: int
    """rows of the output head, which may be more than the tokenizer has entries"""
    max_context: int
    dtype_name: str

    def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
        """Run windows of equal length, without padding."""

    def log_probabilities(self, final_ND: torch.Tensor, values_N: torch.Tensor) -> np.ndarray:
        """Natural log-probabilities of the values, float32 [N]."""


@dataclass(frozen=True, kw_only=True)
class PositionStates:
    """The rows of a block of positions, in order."""

    block: Block
    states: Mapping[str, torch.Tensor]
    """named states, float32 [n, D]"""
    log_probabilities: np.ndarray
    """of the values, float32 [n]"""


class TransformersSource:
    """A Hugging Face causal language model as a StateSource."""

    def __init__(
        self, path: str, *, dtype: str = "auto", device: str = "auto", attention: str = "sdpa", local_rank: int = 0
    ) -> None:
        self.device = torch.device(resolve_device(device, local_rank))
        self.dtype_name = resolve_dtype(dtype, self.device)
        try:
            self.model = load_base(path, dtype=DTYPES[self.dtype_name], device=self.device, attention=attention)
            self.num_layers = len(decoder_layers(self.model))
            self._transform = logit_transform(self.model)
        except ValueError as error:
            raise UserError(f"--model {path}: {error}") from error
        config = self.model.config.get_text_config()
        self.width = config.hidden_size
        self.vocab_size = len(output_head(self.model)[0])
        self.max_context = getattr(config, "max_position_embeddings", None) or 1 << 30

    @torch.no_grad()
    def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
        captured = capture(self.model, list(dict.fromkeys(points.values())))(tokens_BS.to(self.device))
        states = {name: captured.states[point].float().cpu() for name, point in points.items()}
        return BatchStates(states=states, final_BSD=captured.final_BSD)

    @torch.no_grad()
    def log_probabilities(self, final_ND: torch.Tensor, values_N: torch.Tensor) -> np.ndarray:
        weight_VD, bias_V = output_head(self.model)
        transform = None if self._transform.is_identity else self._transform
        result_N = label_log_probabilities(
            final_ND, weight_VD, values_N.to(self.device), bias=bias_V, transform=transform
        )
        return result_N.cpu().numpy()


def resolve_device(device: str, local_rank: int = 0) -> str:
    """`auto` is this rank's own GPU where there are GPUs, else the CPU."""
    if device != "auto":
        return device
    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def check_source_reads(source: StateSource, corpus: CorpusSplit, model: str, *, flag: str = "--model") -> None:
    """Refuse a corpus that this base cannot read: other tokens, a larger vocabulary, or longer blocks than its context.

    Raises:
        UserError: with what differs.
    """
    if corpus.vocab_size > source.vocab_size:
        raise UserError(
            f"the corpus {corpus.root} has a vocabulary of {corpus.vocab_size}, the model one of "
            f"{source.vocab_size} ({flag} {model}): prepare the corpus with the model's own tokenizer"
        )
    if corpus.block_size > source.max_context:
        raise UserError(
            f"the corpus {corpus.root} has blocks of {corpus.block_size} tokens, the model reads at most "
            f"{source.max_context} ({flag} {model}): prepare it with a smaller --block-size"
        )
    own, common = _model_file(model, "tokenizer.json"), corpus.tokenizer_path / "tokenizer.json"
    if own is None or not common.is_file():
        return
    ids = Tokenizer.from_file(str(common)).get_vocab()
    for token, number in Tokenizer.from_file(str(own)).get_vocab().items():
        if ids.get(token, number) != number:
            raise UserError(
                f"{flag} {model} has another vocabulary than the corpus: {token!r} is {number} there and {ids[token]} here; "
                "prepare the corpus with the model's own tokenizer"
            )


def resolve_point(source: StateSource, layer: int | float, point: str, *, flag: str) -> CapturePoint:
    """The capture point at an index or a fraction of the depth.

    Raises:
        UserError: the layer does not exist.
    """
    try:
        return CapturePoint(layer=resolve_layer(layer, source.num_layers), point=point)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def scan_positions(
    source: StateSource, corpus: CorpusSplit, block: Block, points: Mapping[str, CapturePoint], *, batch_windows: int
) -> Iterator[PositionStates]:
    """Run the base over the windows that predict the positions of `block`; give their rows in order, batch by batch.

    The batches are the same whoever asks for the block, so that its rows are too.
    """
    windows = [window for window in corpus.windows() if window.start < block.stop and window.stop > block.start]
    for at in range(0, len(windows), batch_windows):
        yield _scan_batch(source, corpus, block, windows[at : at + batch_windows], points)


def _scan_batch(
    source: StateSource, corpus: CorpusSplit, block: Block, windows: list[Window], points: Mapping[str, CapturePoint]
) -> PositionStates:
    tokens = np.stack([corpus.tokens(window.context_start, window.stop) for window in windows])
    batch = source.read(torch.from_numpy(tokens), points)
    rows = [
        slice(
            max(window.start, block.start) - window.context_start, min(window.stop, block.stop) - window.context_start
        )
        for window in windows
    ]

    def pick(values_BSD: torch.Tensor) -> torch.Tensor:
        return torch.cat([values_BSD[index, row] for index, row in enumerate(rows)])

    start, stop = max(windows[0].start, block.start), min(windows[-1].stop, block.stop)
    log_probabilities = source.log_probabilities(pick(batch.final_BSD), torch.from_numpy(corpus.values(start, stop)))
    return PositionStates(
        block=Block(start, stop),
        states={name: pick(state) for name, state in batch.states.items()},
        log_probabilities=log_probabilities,
    )


def fingerprint_model(name_or_path: str) -> str:
    """SHA-256 of a model's configuration and weight files, whatever its directory is called; fetches them from the Hub.

    Raises:
        UserError: neither a model directory nor a Hub name that can be reached, or one without weights.
    """
    config = _model_file(name_or_path, "config.json")
    if config is None:
        raise UserError(
            f"--model {name_or_path} is neither a Hugging Face model directory (config.json, weights) nor a model "
            "that the Hub gave: check the path or the network"
        )
    digest = hashlib.sha256()
    for path in [config, *_weight_files(name_or_path)]:
        digest.update(path.name.encode() + b"\0" + str(path.stat().st_size).encode() + b"\0")
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _weight_files(name_or_path: str) -> list[Path]:
    """The files that transformers would load, in the order of their names."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if path := _model_file(name_or_path, single):
            return [path]
        if index := _model_file(name_or_path, f"{single}.index.json"):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            shards = [_model_file(name_or_path, name) for name in names]
            if all(shards):
                return [shard for shard in shards if shard is not None]
    raise UserError(
        f"--model {name_or_path} has no weights (model.safetensors or its shards): download or save it again"
    )


def _model_file(name_or_path: str, name: str) -> Path | None:
    """A file of a model directory, or of a Hub model (fetched if need be); None where there is none."""
    if Path(name_or_path).exists():
        path = Path(name_or_path) / name
        return path if path.is_file() else None
    try:
        found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(str(found))

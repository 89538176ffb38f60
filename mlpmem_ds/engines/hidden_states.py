"""The base's forward pass over a corpus: hidden states and label log-probabilities, position by position.

`StateSource` is the protocol that another engine has to meet: a batch of token blocks in, the requested
states and the final hidden states' log-probabilities out. `TransformersSource` is the one we ship.

B windows, S tokens, D width, n positions.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from mlpmem_ds.core.ahead import run_ahead
from mlpmem_ds.core.blocks import Block, Window
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.attention import reason_against
from mlpmem_ds.engines.host_copies import HostCopies, to_device
from mlpmem_ds.engines.model_files import check_model_reads, max_context_of
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.model_directory import fault_of
from mlpmem_ds.formats.window_tokens import WindowTokens, window_tokens
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.models.backbone import Capture, CapturedStates, capture, logit_transform
from mlpmem_ds.models.base_loading import attention_of, load_base
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.past_states import with_past
from mlpmem_ds.models.structure import decoder_layers, output_head, resolve_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger(__name__)
_LOG_PROBABILITIES = "log_probabilities"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BatchStates:
    """What one batch of windows gives: named states [B, S, D] and the final ones, each in the base's dtype,
    on the device where it was computed."""

    states: Mapping[str, torch.Tensor]
    final_BSD: torch.Tensor


class StateSource(Protocol):
    """An engine that runs a base."""

    num_layers: int
    width: int
    final_width: int
    """numbers in what the output head reads; in a few bases fewer than `width`"""
    vocab_size: int
    """rows of the output head, which may be more than the tokenizer has entries"""
    max_context: int
    dtype_name: str
    attention: str
    """the implementation that it runs with"""
    is_collective: bool
    """whether the ranks hold the base together: then all of them must call `read` and `log_probabilities` in
    the same order, equally often, and in one thread"""

    def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
        """Run windows of equal length, without padding."""

    def log_probabilities(self, final_ND: torch.Tensor, values_N: torch.Tensor) -> torch.Tensor:
        """Natural log-probabilities of the values, float32 [N], on the device of the output head."""


Finish = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Makes of a batch's named states [n, D], on their devices, what is needed of them."""


@dataclass(frozen=True, kw_only=True)
class PositionStates:
    """The rows of a block of positions, in order, on the CPU."""

    block: Block
    states: Mapping[str, torch.Tensor]
    """named states [n, D] in the base's dtype, or what was made of them"""
    log_probabilities: np.ndarray
    """of the values, float32 [n]"""


class TransformersSource:
    """A Hugging Face causal language model as a StateSource. `layers_path` names its decoder's layers; `flag`
    named it. `attention`: as `load_base` takes it, later that which it runs with."""

    is_collective = False

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        attention: str = "auto",
        layers_path: str | None = None,
        flag: str = "--model",
        device_map: str | dict[str, Any] | None = None,
        offload_folder: Path | None = None,
    ) -> None:
        self.layers_path = layers_path
        self.device = torch.device(device)
        self.dtype_name = resolve_dtype(dtype, self.device)
        if reason := reason_against(attention, device=self.device, dtype=self.dtype_name):
            raise UserError(f"--attention {attention}: {reason}")
        try:
            self.model = self._load(path, attention, device_map, offload_folder)
            self._layers = decoder_layers(self.model, layers_path)
            self.transform = logit_transform(self.model, with_head=self._head)
            with self._head():
                self.vocab_size, self.final_width = output_head(self.model)[0].shape
        except ValueError as error:
            raise UserError(f"{flag} {path}: {fault_of(path, error)}") from error
        config = self.model.config.get_text_config()
        self.num_layers = len(self._layers)
        self.width = config.hidden_size
        self.max_context = max_context_of(config)
        self.attention = attention_of(self.model)
        if attention == "auto" and self.attention != "sdpa":
            _logger.info(
                "%s has no attention of the kind sdpa: it runs with %s, which is slower and gives the same",
                path,
                self.attention,
            )
        self._length_seen, self._lock = 0, threading.Lock()

    def _load(
        self, path: str, attention: str, device_map: str | dict[str, Any] | None, offload_folder: Path | None
    ) -> PreTrainedModel:
        return load_base(
            path,
            dtype=DTYPES[self.dtype_name],
            device=self.device,
            attention=attention,
            device_map=device_map,
            offload_folder=offload_folder,
        )

    @torch.no_grad()
    def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
        requested = list(dict.fromkeys(points.values()))
        reader = capture(self.model, requested, layers_path=self.layers_path)
        # The reader of a training may be in here while a skipped step's inputs are looked at: the hooks of
        # one would record what the other reads.
        with self._lock:
            captured = self._captured(reader, to_device(tokens_BS, self.device))
        states = {name: captured.states[point] for name, point in points.items()}
        return BatchStates(states=states, final_BSD=captured.final_BSD)

    def _captured(self, reader: Capture, tokens_BS: torch.Tensor) -> CapturedStates:
        """Run a batch; of the first of full length it is said where layers read it with a mask."""
        length = tokens_BS.shape[1]
        if length <= self._length_seen:
            return reader(tokens_BS)
        self._length_seen = length
        with masks_of_layers(self._layers) as masks:
            captured = reader(tokens_BS)
        if self.attention == "sdpa" and any(masks):
            _logger.warning(
                "%d of %d layers read windows of %d tokens with an attention mask (a sliding window that"
                " is shorter?): slower than without",
                sum(masks),
                self.num_layers,
                length,
            )
        return captured

    @torch.no_grad()
    def log_probabilities(self, final_ND: torch.Tensor, values_N: torch.Tensor) -> torch.Tensor:
        transform = None if self.transform.is_identity else self.transform
        with self.head() as (weight_VD, bias_V):
            device = weight_VD.device
            values_N = to_device(values_N, device)
            return label_log_probabilities(
                final_ND.to(device), weight_VD, values_N, bias=bias_V, transform=transform
            )

    @contextlib.contextmanager
    def head(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The output head's weight [V, D] and bias [V], on their device while this is open."""
        with self._head():
            yield output_head(self.model)

    def _head(self) -> contextlib.AbstractContextManager[None]:
        """The output head's weights: where the base is spread over devices, they may lie on another
        or on disk."""
        if not hasattr(self.model, "hf_device_map"):
            return contextlib.nullcontext()
        return weights_on_device(self.model.get_output_embeddings())


def weights_on_device(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The weights of a module, of a base that may be spread over devices, on their device while this is
    open."""
    from accelerate.utils import align_module_device

    opened: contextlib.AbstractContextManager[None] = align_module_device(module)
    return opened


@contextlib.contextmanager
def masks_of_layers(layers: Iterable[nn.Module]) -> Iterator[list[bool]]:
    """While open, the forwards of these layers add to the list whether they were given an attention mask.

    Full windows need none: without one, scaled_dot_product_attention takes its causal kernel.
    """
    masks: list[bool] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in args if isinstance(value, torch.Tensor) and value.ndim == 4]
        masks.append(bool(tensors) or kwargs.get("attention_mask") is not None)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
        yield masks


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def check_source_reads(
    source: StateSource,
    splits: Sequence[CorpusSplit],
    model: str,
    *,
    flag: str = "--model",
    shared: Path | None = None,
) -> None:
    """`check_model_reads` of a base that is loaded."""
    check_model_reads(
        model,
        splits,
        vocab_size=source.vocab_size,
        max_context=source.max_context,
        flag=flag,
        shared=shared,
    )


def state_width(source: StateSource, point: CapturePoint) -> int:
    """Numbers in a position's state at a point, with those before it where it has a past."""
    last = source.final_width if point.point == "final_norm" else source.width
    return (1 + point.past) * (len(point.earlier) * source.width + last)


def resolve_point(
    source: StateSource,
    layer: int | float,
    point: str,
    *,
    flag: str,
    earlier: Sequence[int | float] = (),
) -> CapturePoint:
    """The capture point at an index or a fraction of the depth, with those before it.

    Raises:
        UserError: the layer does not exist.
    """
    try:
        return CapturePoint(
            layer=resolve_layer(layer, source.num_layers),
            point=point,  # type: ignore[arg-type]
            earlier=tuple(resolve_layer(number, source.num_layers) for number in earlier),
        )
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def is_read_ahead(source: StateSource) -> bool:
    """Whether batches are queued before they are needed: where the host is free while the device works."""
    on_gpu = isinstance(source, TransformersSource) and source.device.type == "cuda"
    return on_gpu and not source.is_collective


def scan_positions(
    source: StateSource,
    corpus: CorpusSplit,
    block: Block,
    points: Mapping[str, CapturePoint],
    *,
    batch_windows: int,
    with_log_probabilities: bool = True,
    finish: Finish | None = None,
    ahead: bool | None = None,
    chosen: Callable[[Block], np.ndarray | None] | None = None,
) -> Iterator[PositionStates]:
    """Run the base over the windows that predict the positions of `block`; give their rows in order, batch by
    batch.

    The batches are the same whoever asks for the block, so that its rows are too. Where the log-probabilities
    are not needed (keys of a model that is not the memory's base), the head is not multiplied, and their
    array is empty.

    `finish` runs where the states are, right behind the forward; only what it gives is copied to the host.

    `ahead`: a thread runs the next batch while the caller works on this one; None = where the base is on a
    GPU. (On a CPU both would want the same cores.) The generator must be at its end, or dropped, before the
    base is used otherwise.

    `chosen` gives the places, from its start, of the positions of a block that have rows (None: all do). A
    batch of windows without any is not read.
    """
    windows = corpus.windows()
    numbers = windows.covering(block)

    def scan() -> Iterator[_Scanned]:
        for at in range(numbers.start, numbers.stop, batch_windows):
            batch = windows[at : min(at + batch_windows, numbers.stop)]
            part = Block(max(batch[0].start, block.start), min(batch[-1].stop, block.stop))
            places_n = None if chosen is None else chosen(part)
            if places_n is None or len(places_n):
                yield _scan_batch(
                    source, corpus, part, batch, points, with_log_probabilities, finish, places_n
                )

    if ahead is None:
        ahead = is_read_ahead(source)
    batches = scan()
    if ahead:  # the next batch is being queued when one is handed out: the device does not wait for the host
        batches = run_ahead(batches, count=1, name="states")
    for scanned in batches:
        yield scanned.arrived()


def rows_of_window(
    states_TD: torch.Tensor, tokens: WindowTokens, row: int, part: Block, past: int
) -> torch.Tensor:
    """The states of some positions of a window, with the `past` before each; zeros before the first one that
    the window predicts."""
    first = max(tokens.windows[row].start, part.start - past)
    states_nD = states_TD[tokens.columns(row, Block(first, part.stop))]
    return with_past(states_nD, past)[part.start - first :] if past else states_nD


@dataclass(frozen=True, kw_only=True)
class _Scanned:
    """A batch whose work is queued on the device."""

    block: Block
    copies: HostCopies

    def arrived(self) -> PositionStates:
        """Its rows, when the device is done with them."""
        rows_n = dict(self.copies.wait())
        scores_n = rows_n.pop(_LOG_PROBABILITIES, torch.empty(0))
        return PositionStates(block=self.block, states=rows_n, log_probabilities=scores_n.numpy())


def _scan_batch(
    source: StateSource,
    corpus: CorpusSplit,
    block: Block,
    windows: list[Window],
    points: Mapping[str, CapturePoint],
    with_log_probabilities: bool,
    finish: Finish | None,
    places_n: np.ndarray | None,
) -> _Scanned:
    """Of the windows' positions those in `block`, or some of them: at these places from its start."""
    tokens = window_tokens(corpus, windows)
    batch = source.read(torch.from_numpy(tokens.tokens_BT), points)
    parts = [Block(max(window.start, block.start), min(window.stop, block.stop)) for window in windows]

    def pick(values_BTD: torch.Tensor, past: int = 0) -> torch.Tensor:
        rows = [rows_of_window(values_BTD[row], tokens, row, part, past) for row, part in enumerate(parts)]
        picked_ND = torch.cat(rows)
        if places_n is None:
            return picked_ND
        return picked_ND[to_device(torch.from_numpy(places_n), picked_ND.device)]

    states: Mapping[str, torch.Tensor] = {
        name: pick(state, points[name].past) for name, state in batch.states.items()
    }
    rows_n = dict(states if finish is None else finish(states))
    if with_log_probabilities:
        values = corpus.values(*block)
        values_n = torch.from_numpy(values if places_n is None else values[places_n])
        rows_n[_LOG_PROBABILITIES] = source.log_probabilities(pick(batch.final_BSD), values_n)
    return _Scanned(block=block, copies=HostCopies(rows_n))

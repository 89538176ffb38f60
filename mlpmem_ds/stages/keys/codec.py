"""Part of `extract_keys`: the pass over a sample of windows that fits the int8 codec, and how states are
checked.

N positions of the sample, n of a batch, D width of the base, E numbers of a key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block, Window
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import canonical_json
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.engines.hidden_states import StateSource
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.counted_rows import CountedRows
from mlpmem_ds.formats.keys import CodecFile
from mlpmem_ds.formats.window_tokens import window_tokens
from mlpmem_ds.maths.codec import FittedCodec, MassiveDimension, fit_codec
from mlpmem_ds.models.capture_point import CapturePoint

_logger = logging.getLogger(__name__)
_MAX_DIMENSIONS_NAMED = 8


def sample_windows(corpus: CorpusSplit, num_positions: int, *keys: int) -> list[Window]:
    """Windows in a random order (a pure function of `keys`) until they hold the requested number of
    positions that have rows; without those that hold none."""
    windows, counted, taken, total = corpus.windows(), CountedRows(corpus), [], 0
    for number in shuffled(len(windows), *keys):
        if total >= num_positions:
            break
        window = windows[int(number)]
        offsets_n = counted.offsets(Block(window.start, window.stop))
        num_rows = window.stop - window.start if offsets_n is None else len(offsets_n)
        if num_rows:
            taken.append(window)
        total += num_rows
    return taken


def read_windows(
    source: StateSource,
    corpus: CorpusSplit,
    windows: Sequence[Window],
    point: CapturePoint,
    *,
    batch_windows: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run any windows: the positions that a batch of them predicts, int64 [n], and their states, float32 [n,
    D]."""
    for at in range(0, len(windows), batch_windows):
        batch = windows[at : at + batch_windows]
        tokens = window_tokens(corpus, batch)
        states_BTD = source.read(torch.from_numpy(tokens.tokens_BT), {"key": point}).states["key"]
        parts = [
            states_BTD[row, tokens.columns(row, Block(window.start, window.stop))]
            for row, window in enumerate(batch)
        ]
        positions_n = np.concatenate([np.arange(window.start, window.stop) for window in batch])
        yield positions_n, checked(torch.cat(parts), positions_n, "key", point)


def read_sample(
    source: StateSource, corpus: CorpusSplit, point: CapturePoint, num_positions: int, seed: int
) -> np.ndarray:
    """The states of the sample that fits the codec, float32 [N, D]; window by window, so the same for any
    batch size."""
    windows, counted = sample_windows(corpus, num_positions, seed), CountedRows(corpus)
    parts = []
    for positions_n, states_nD in read_windows(source, corpus, windows, point, batch_windows=1):
        offsets_n = counted.offsets(Block(int(positions_n[0]), int(positions_n[-1]) + 1))
        parts.append(states_nD if offsets_n is None else states_nD[offsets_n])
    return np.concatenate(parts)


def fit_sample(states_ND: np.ndarray, dim: int, seed: int) -> FittedCodec:
    """`maths.codec.fit_codec`; its ValueError is a UserError here."""
    try:
        return fit_codec(states_ND, dim, seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from error


def write_codec(states_ND: np.ndarray, dim: int, seed: int, writer: UnitWriter) -> dict[str, Any]:
    """Fit the codec of `dim` numbers and publish it as the unit `codec`; returns its summary."""
    fitted = fit_sample(states_ND, dim, seed)
    writer.array("codec/mean.npy", fitted.mean_D.astype(np.float32))
    writer.array("codec/rotation.npy", fitted.rotation_DE.astype(np.float32))
    summary: dict[str, Any] = to_json(
        CodecFile(
            scale=fitted.scale,
            energy_kept=fitted.energy_kept,
            positions=len(states_ND),
            massive_dimensions=fitted.massive,
        )
    )
    with writer.file("codec/codec.json") as path:
        path.write_bytes(canonical_json(summary))
    _logger.info(
        "codec: %d of %d dimensions keep %.4f of the energy", dim, states_ND.shape[1], fitted.energy_kept
    )
    if fitted.massive:
        _logger.info("codec: %s", describe_massive(fitted.massive))
    return summary


def describe_massive(massive: Sequence[MassiveDimension]) -> str:
    """The massive dimensions in words."""
    shown = [
        f"{entry.dimension} (up to {entry.largest:.4g} from its median, clipped to [{entry.low:.4g},"
        f" {entry.high:.4g}])"
        for entry in massive[:_MAX_DIMENSIONS_NAMED]
    ]
    more = f" and {len(massive) - len(shown)} more" if len(massive) > len(shown) else ""
    return f"{len(massive)} dimensions with massive activations: {', '.join(shown)}{more}"


def checked(
    states_nD: torch.Tensor, positions_n: Sequence[int] | np.ndarray, name: str, point: CapturePoint
) -> np.ndarray:
    """The states as float32 [n, D] on the CPU, all finite.

    Raises:
        UserError: as `refuse_infinite`.
    """
    refuse_infinite(torch.isfinite(states_nD).all(dim=1), positions_n, name, point)
    return states_nD.cpu().float().numpy()


def refuse_infinite(
    finite_n: torch.Tensor, positions_n: Sequence[int] | np.ndarray, name: str, point: CapturePoint
) -> None:
    """Refuse states of which some are not finite.

    Raises:
        UserError: names the first position and the layer that gave a number which is not finite.
    """
    if not bool(finite_n.all()):
        position = int(positions_n[int((~finite_n).nonzero()[0])])
        raise UserError(
            f"the {name} at position {position}, layer {point.layer} ({point.point}), is not finite: the"
            " model's weights are damaged, or --dtype float32 is needed (and another --output, where this"
            " one was begun)"
        )


def check_log_probabilities(log_probabilities_n: np.ndarray, positions_n: Sequence[int] | np.ndarray) -> None:
    """Refuse log-probabilities that are not finite: then the output head is damaged, which no hidden state
    shows.

    Raises:
        UserError: names the first position.
    """
    finite_n = np.isfinite(log_probabilities_n)
    if not finite_n.all():
        raise UserError(
            f"the base's log-probability at position {int(positions_n[int(np.flatnonzero(~finite_n)[0])])} is"
            " not finite: the weights after its last layer are damaged, or --dtype float32 is needed (and"
            " another --output, where this one was begun)"
        )

"""Memory inputs computed when a batch needs them: the frozen base runs over the windows of the corpus.

Part of `train`, where the key directory stores no inputs. The windows, the layer and the rounding to bfloat16
are those of `extract_keys`, and so are the inputs, but for the last bit of a float sum.

T tokens of a window as it is read, D width, n positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from mlpmem_ds.core.blocks import Block, Window
from mlpmem_ds.engines.hidden_states import StateSource, rows_of_window
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.window_tokens import window_tokens
from mlpmem_ds.models.capture_point import CapturePoint


class OnlineInputs:
    """Called with ranges of positions, it gives their inputs one after another: bfloat16 [n, D].

    Args:
        source: the base, as `extract_keys` ran it; if it is collective, calls are too, and need all ranks'
            ranges (`others`).
        corpus: the split whose positions are meant.
        point: where the memory reads.
        batch_windows: windows that go through the base at once.
    """

    def __init__(
        self, source: StateSource, corpus: CorpusSplit, point: CapturePoint, *, batch_windows: int = 8
    ) -> None:
        self._source, self._corpus, self._point = source, corpus, point
        self._batch_windows = batch_windows
        self.is_collective = source.is_collective

    def __call__(self, runs: Sequence[Block], others: Iterable[Sequence[Block]] = ()) -> torch.Tensor:
        parts = [part for run in runs for part in self._windows_of(run)]
        groups = [parts[at : at + self._batch_windows] for at in range(0, len(parts), self._batch_windows)]
        inputs = [self._read(group) for group in groups]
        for _ in range(len(groups), max(map(self._num_groups, others), default=0)):
            # Other ranks have more, and a forward of a base that is cut over the ranks needs all of them.
            self._read(groups[-1])
        return torch.cat(inputs)

    def _num_groups(self, runs: Sequence[Block]) -> int:
        windows = self._corpus.windows()
        return math.ceil(sum(len(windows.covering(run)) for run in runs) / self._batch_windows)

    def _windows_of(self, run: Block) -> list[tuple[Window, Block]]:
        """The windows that predict positions of `run`, each with those positions."""
        windows = self._corpus.windows()
        return [
            (
                windows[number],
                Block(max(windows[number].start, run.start), min(windows[number].stop, run.stop)),
            )
            for number in windows.covering(run)
        ]

    def _read(self, group: Sequence[tuple[Window, Block]]) -> torch.Tensor:
        tokens = window_tokens(self._corpus, [window for window, _ in group])
        batch = self._source.read(torch.from_numpy(tokens.tokens_BT), {"input": self._point})
        states_BTD = batch.states["input"]
        past = self._point.past
        rows = [
            rows_of_window(states_BTD[row], tokens, row, part, past) for row, (_, part) in enumerate(group)
        ]
        return torch.cat(rows).to(torch.bfloat16)

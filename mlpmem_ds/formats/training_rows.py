"""Rows of a training: labels and targets as they are read, and what one forward of the trainer takes.

N, n rows, I input size, E entries of sparse targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.maths.sparse_loss import TargetBatch
from mlpmem_ds.maths.sparse_rows import SparseRows


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRows:
    """What belongs to some positions besides their inputs.

    `values_n` token ids; `log_probabilities_n` the base's of the values, None where the loss does not need
    them; `targets` in int32 and float32.
    """

    values_n: np.ndarray
    log_probabilities_n: np.ndarray | None
    targets: SparseRows

    @classmethod
    def join(cls, parts: Sequence[TrainingRows]) -> TrainingRows:
        """The rows of the parts (at least one), one part after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            values_n=np.concatenate([part.values_n for part in parts]),
            log_probabilities_n=_joined([part.log_probabilities_n for part in parts]),
            targets=SparseRows.join([part.targets for part in parts]),
        )

    @classmethod
    def gather(
        cls, parts: Sequence[TrainingRows], part_of_m: np.ndarray, row_of_m: np.ndarray
    ) -> TrainingRows:
        """Rows of the parts (at least one), in the order asked for: row ``row_of_m[i]`` of part
        ``part_of_m[i]``."""
        starts = np.cumsum([0, *(len(part.values_n) for part in parts)])
        index_m = starts[part_of_m] + row_of_m
        logs = _joined([part.log_probabilities_n for part in parts])
        return cls(
            values_n=np.concatenate([part.values_n for part in parts])[index_m],
            log_probabilities_n=None if logs is None else logs[index_m],
            targets=SparseRows.gather([part.targets for part in parts], part_of_m, row_of_m),
        )

    def rows(self, start: int, stop: int) -> TrainingRows:
        """The rows [start, stop), without a copy."""
        logs_n = self.log_probabilities_n
        return TrainingRows(
            values_n=self.values_n[start:stop],
            log_probabilities_n=None if logs_n is None else logs_n[start:stop],
            targets=self.targets.rows(start, stop),
        )


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What one forward of the trainer takes: bfloat16 inputs [N, I] and the rows' targets."""

    inputs_NI: torch.Tensor
    targets: TargetBatch


def micro_batches(inputs_NI: torch.Tensor, rows: TrainingRows, count: int) -> list[MicroBatch]:
    """A rank's rows of a batch in `count` equal parts; views of the inputs."""
    size = len(rows.values_n) // count
    blocks = [Block(at, at + size) for at in range(0, len(rows.values_n), size)]
    parts = [(block, rows.rows(*block)) for block in blocks]
    return [
        MicroBatch(
            inputs_NI=inputs_NI[block.start : block.stop],
            targets=TargetBatch.from_rows(part.targets, part.values_n, part.log_probabilities_n),
        )
        for block, part in parts
    ]


def stored_inputs(bits_nI: np.ndarray) -> torch.Tensor:
    """Bit patterns of bfloat16, uint16 [n, I], as a tensor over the same memory."""
    return torch.from_numpy(bits_nI).view(torch.bfloat16)


def finite_rows(part: MicroBatch) -> torch.Tensor:
    """bool [N]: whether a row's inputs, target and base's log-probability are finite."""
    targets = part.targets
    finite = torch.isfinite(part.inputs_NI).all(dim=1).cpu()
    rows_E = torch.repeat_interleave(torch.arange(len(finite)), targets.offsets_N1.diff())
    finite[rows_E[~torch.isfinite(targets.probabilities)]] = False
    logs_N = targets.base_log_probabilities_N
    return finite if logs_N is None else finite & torch.isfinite(logs_N)

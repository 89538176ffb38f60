"""Validation during training: perplexity of base, memory and their best interpolation on the corpus's tuning
split.

Place in the pipeline: inside `train`. The base's log-probabilities and the memory's inputs are computed once,
at the start, and held in memory; a validation is then a forward of the memory over some thousand rows.

N rows of this rank, I input size, G grid of interpolation weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mlpmem_ds.core.blocks import Block, deal
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish, publish_json
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import Engine
from mlpmem_ds.engines.hidden_states import StateSource, scan_positions
from mlpmem_ds.engines.processes import gather_values
from mlpmem_ds.formats.checkpoint import checkpoint_name
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.models.mixture import Grid
from mlpmem_ds.models.mixture_scores import mixed_scores

DEFAULT_POSITIONS = 16_384
VALIDATIONS_A_RUN = 5
_GRID = Grid.parse(["0.05:1:0.05"])
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What one validation found. `perplexity` is that of the interpolation at its best `lmbda`."""

    step: int
    perplexity: float
    lmbda: float
    memory_perplexity: float
    base_perplexity: float

    def metrics(self) -> dict[str, float]:
        """As metrics.jsonl names them."""
        return {
            "validation_base_perplexity": self.base_perplexity,
            "validation_memory_perplexity": self.memory_perplexity,
            "validation_perplexity": self.perplexity,
            "validation_lambda": self.lmbda,
        }


class Validator:
    """Holds this rank's rows of the tuning split; `run` is collective.

    Args:
        source: the base, needed only here in the constructor.
        corpus: the tuning split.
        point: where the memory reads.
        positions: at most so many, in windows spread evenly over the split.
        world: this rank; the windows are dealt.
    """

    def __init__(
        self, source: StateSource, corpus: CorpusSplit, point: CapturePoint, *, positions: int, world: World
    ) -> None:
        windows = corpus.windows()
        chosen = windows[:: max(1, math.ceil(corpus.num_positions / positions))]
        mine = deal(chosen, world.rank, world.size)
        # Every rank runs the base as often as rank 0, which has the most: one that is cut over the ranks
        # takes all of them.
        padded = mine + chosen[: len(deal(chosen, 0, world.size)) - len(mine)]
        scanned = [
            next(
                scan_positions(
                    source,
                    corpus,
                    Block(window.start, window.stop),
                    {"input": point},
                    batch_windows=1,
                    ahead=False,
                )
            )
            for window in padded
        ]
        parts = [(part, tuple(part.block)) for part in scanned[: len(mine)]]
        inputs = [part.states["input"].to(torch.bfloat16) for part, _ in parts]
        self._world = world
        self._inputs_NI = torch.cat(inputs) if inputs else torch.zeros(0, source.width, dtype=torch.bfloat16)
        self._labels_N = torch.cat(
            [torch.from_numpy(corpus.values(*span)) for _, span in parts]
            or [torch.zeros(0, dtype=torch.int64)]
        )
        self._base_N = np.concatenate([part.log_probabilities for part, _ in parts] or [np.zeros(0)]).astype(
            np.float64
        )
        self.num_positions = sum(gather_values(len(self._base_N), world))
        self._num_chunks = max(gather_values(math.ceil(len(self._base_N) / _ROWS_AT_ONCE), world))

    def run(self, engine: Engine, step: int) -> Validation:
        """Score the memory as it is now."""
        memory_N = self._score(engine)
        sums = [
            self._base_N.sum(),
            memory_N.sum(),
            *(mixed_scores(self._base_N, memory_N, gate.lmbda).sum() for gate in _GRID),
        ]
        totals = np.array(gather_values([float(value) for value in sums], self._world)).sum(axis=0)
        base, memory, *mixtures = np.exp(-totals / self.num_positions).tolist()
        best = int(np.argmin(mixtures))
        return Validation(
            step=step,
            perplexity=mixtures[best],
            lmbda=_GRID.lambdas[best],
            memory_perplexity=memory,
            base_perplexity=base,
        )

    def _score(self, engine: Engine) -> np.ndarray:
        """float64 [N]: the memory's log-probabilities; every rank runs as many forwards."""
        scores = []
        with engine.evaluating():
            for chunk in range(self._num_chunks):
                rows = slice(chunk * _ROWS_AT_ONCE, (chunk + 1) * _ROWS_AT_ONCE)
                labels_N = self._labels_N[rows]
                if len(labels_N):
                    inputs_NI = self._inputs_NI[rows]
                else:  # the others have more
                    inputs_NI, labels_N = (
                        self._inputs_NI.new_zeros(1, self._inputs_NI.shape[1]),
                        torch.zeros(1).long(),
                    )
                scores_N = engine.forward(
                    inputs_NI.to(engine.device, engine.dtype), None, labels_N.to(engine.device)
                ).cpu()
                scores.append(scores_N[: len(self._labels_N[rows])].double().numpy())
        return np.concatenate(scores)


class BestWeights:
    """OUTPUT/best.json and OUTPUT/best/: the weights of the validation that was the best so far.

    The files of earlier bests go when a checkpoint holds the later one: a run that falls back to an older
    checkpoint finds the weights that its history names.
    """

    def __init__(self, output: Path, history: Sequence[Mapping[str, Any]] = ()) -> None:
        self._output = output
        self.history = [Validation(**entry) for entry in history]

    @property
    def best(self) -> Validation | None:
        """The least perplexity, the first if several."""
        return min(self.history, key=lambda validation: validation.perplexity, default=None)

    def has_stalled(self, patience: int) -> bool:
        """Whether so many validations came after the best one; never with 0."""
        best = self.best
        return (
            patience > 0 and best is not None and len(self.history) - 1 - self.history.index(best) >= patience
        )

    def add(self, validation: Validation, engine: Engine, *, keep: bool) -> None:
        """Remember a validation; keep the weights if it is the best. Collective."""
        self.history.append(validation)
        if self.best is not validation or not keep:
            return
        weights = engine.whole_weights()
        if weights:
            path = self._path(validation)
            path.parent.mkdir(exist_ok=True)
            with publish(path) as temporary:
                save_file(weights, temporary)
            publish_json(
                self._output / "best.json",
                {
                    "step": validation.step,
                    "perplexity": validation.perplexity,
                    "lambda": validation.lmbda,
                    "memory_perplexity": validation.memory_perplexity,
                    "base_perplexity": validation.base_perplexity,
                    "weights": f"best/{path.name}",
                },
            )
        engine.wait()

    def plain(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [asdict(validation) for validation in self.history]

    def remove_others(self) -> None:
        """Remove the files of validations that are no longer the best; rank 0, after a checkpoint."""
        best = self.best
        for path in (self._output / "best").glob("step-*.safetensors"):
            if best is not None and path != self._path(best):
                path.unlink()

    def read(self) -> dict[str, torch.Tensor]:
        """The best weights.

        Raises:
            UserError: they are gone.
        """
        best = self.best
        assert best is not None
        try:
            return load_file(self._path(best))
        except FileNotFoundError as error:
            raise UserError(
                f"{self._path(best)}, the weights of the best validation, is gone: restore it, or train with"
                " --select last"
            ) from error

    def _path(self, validation: Validation) -> Path:
        return self._output / "best" / f"{checkpoint_name(validation.step)}.safetensors"

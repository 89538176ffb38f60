"""Part of `train` and `train_base`: what validations found, when to stop early, and the best weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.engines.deepspeed.engine import Engine
from mlpmem_ds.formats.checkpoint import BEST_WEIGHTS, checkpoint_name
from mlpmem_ds.formats.weight_shards import WeightFiles


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What one validation found."""

    step: int
    perplexity: float
    """what validations are compared by: lower is better"""
    details: Mapping[str, float] = field(default_factory=dict)
    """more numbers, by name, for people"""

    def metrics(self) -> dict[str, float]:
        """As metrics.jsonl names them."""
        numbers = {**self.details, "perplexity": self.perplexity}
        return {f"validation_{name}": value for name, value in numbers.items()}

    def to_json(self) -> dict[str, Any]:
        """A number that is not finite becomes null."""
        numbers = {"perplexity": self.perplexity, **self.details}
        return {
            "step": self.step,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Validation:
        numbers = {name: math.nan if value is None else float(value) for name, value in entry.items()}
        del numbers["step"]
        return cls(step=entry["step"], perplexity=numbers.pop("perplexity"), details=numbers)

    def __str__(self) -> str:
        details = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in self.details.items())
        return f"tuning perplexity {self.perplexity:.3f}" + (f" ({details})" if details else "")


class BestWeights:
    """The validations of a training, and the weights of the best one: OUTPUT/best.json and OUTPUT/best/.

    A checkpoint holds the weights of the best validation until then, so the files of earlier bests go when it
    is saved, and a run that resumes from an older checkpoint, or from a copy, gets back the weights that its
    history names.

    Args:
        output: OUTPUT.
        history: the validations before this start, as `to_json` gave them.
    """

    def __init__(self, output: Path, history: Sequence[Mapping[str, Any]] = ()) -> None:
        self._output = output
        self.history = [Validation.from_json(entry) for entry in history]

    @property
    def best(self) -> Validation | None:
        """The one with the lowest perplexity, the first of equal ones; None where none is finite."""
        finite = [validation for validation in self.history if math.isfinite(validation.perplexity)]
        return min(finite, key=lambda validation: validation.perplexity, default=None)

    def has_stalled(self, patience: int | None) -> bool:
        """Whether so many validations followed the best one; never with None."""
        best = self.best
        if patience is None or best is None:
            return False
        return len(self.history) - 1 - self.history.index(best) >= patience

    def add(self, validation: Validation, engine: Engine, *, keep: bool) -> None:
        """Remember a validation; with `keep` write the weights if it is the best. Collective."""
        self.history.append(validation)
        if self.best is not validation or not keep:
            return
        engine.write_weights(self._output / "best", checkpoint_name(validation.step))
        if engine.is_first:
            self._name_best(validation)

    def _name_best(self, validation: Validation) -> None:
        name = f"best/{checkpoint_name(validation.step)}.safetensors"
        publish_json(self._output / "best.json", {**validation.to_json(), "weights": name})

    def to_json(self) -> list[dict[str, Any]]:
        return [validation.to_json() for validation in self.history]

    def remove_others(self) -> None:
        """Remove the files of validations that are no longer the best; rank 0, after a checkpoint."""
        best = self.best
        for path in (self._output / "best").glob("step-*.safetensors*"):
            if best is not None and not path.name.startswith(checkpoint_name(best.step)):
                path.unlink()

    def restore(self, checkpoint: Path) -> bool:
        """Where OUTPUT lacks the best weights, take them from the checkpoint that was loaded; whether they
        are there now. Rank 0.

        Raises:
            DamagedDataError: the index of their files cannot be read.
            OSError: they cannot be written.
        """
        best = self.best
        if best is None:
            return True
        files = self._files_of(best)
        if files.missing():
            saved = WeightFiles(root=checkpoint / BEST_WEIGHTS, stem=files.stem)
            if saved.missing():
                return False
            saved.link_to(files.root)
        self._name_best(best)
        return True

    def forget(self) -> None:
        """Begin anew, where the best weights are lost: what was no better was not written."""
        self.history.clear()

    def held(self) -> WeightFiles | None:
        """The best weights, float32; None where there are none yet, or a file of them is gone."""
        best = self.best
        if best is None or (files := self._files_of(best)).missing():
            return None
        return files

    def files(self) -> WeightFiles:
        """The best weights, float32.

        Raises:
            UserError: a file of them is gone.
        """
        best = self.best
        assert best is not None
        files = self._files_of(best)
        if gone := files.missing():
            raise UserError(
                f"{gone}, of the weights of the best validation, is gone: run the same command again, it"
                " takes them from the newest checkpoint"
            )
        return files

    def _files_of(self, validation: Validation) -> WeightFiles:
        return WeightFiles(root=self._output / "best", stem=checkpoint_name(validation.step))

"""Part of `train` and `train_base`: metrics.jsonl, TensorBoard, W&B if asked, the progress line's end."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.core.log import append_json_line, read_json_lines
from mlpmem_ds.core.world import World

_SHOWN = {"loss": "loss", "kl": "KL", "ce": "CE", "learning_rate": "lr", "gradient_norm": "norm"}


class Metrics:
    """Appends to OUTPUT/metrics.jsonl and OUTPUT/tensorboard (and to W&B) on rank 0; does nothing elsewhere.

    Args:
        output: OUTPUT.
        world: this rank.
        first_step: steps done before this start; lines of later steps are dropped.
        wandb_project: a W&B project's name, or None.
        run_id: what tells this run from others, so that W&B continues it after a restart.
        description: the run's settings, for W&B.
    """

    def __init__(
        self,
        output: Path,
        world: World,
        first_step: int,
        *,
        wandb_project: str | None = None,
        run_id: str = "",
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = output / "metrics.jsonl"
        self._writer: Any = None
        self._wandb: Any = None
        if not world.is_first:
            return
        self._drop_after(first_step)
        from torch.utils.tensorboard import SummaryWriter  # 1 s to import

        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        if wandb_project is not None:
            self._wandb = require_wandb().init(
                project=wandb_project,
                id=run_id,
                resume="allow",
                dir=str(output),
                config=dict(description or {}),
            )

    def _drop_after(self, step: int) -> None:
        """Drop the lines of steps after the checkpoint that we resume from: they are done again."""
        if not self._path.is_file():
            return
        lines = []
        for line in self._path.read_bytes().split(b"\n"):
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # cut short by a crash
        publish_bytes(self._path, b"".join(lines))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl; numbers that are not finite become null there."""
        if self._writer is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_json_line(self._path, {"step": step, "time": round(time.time(), 3), **finite})
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in finite.items() if value is not None}, step=step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb() -> Any:
    """The wandb library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb-project needs the wandb package ({error}): pip install wandb, or leave the flag out "
            "(metrics.jsonl and TensorBoard are always written)"
        ) from error


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of OUTPUT/metrics.jsonl in order, each with its `step` (int), without those that a crash cut
    short or that are damaged there; [] without a file."""
    lines = read_json_lines(output / "metrics.jsonl")
    return [line for line in lines if type(line.get("step")) is int]


def progress_note(values: Mapping[str, float]) -> str:
    """The progress line's end."""
    words = [f"{label} {values[name]:.4g}" for name, label in _SHOWN.items() if name in values]
    if "mfu" in values:
        words.append(f"MFU {values['mfu']:.0%}")
    words.append(f"wait {values['data_wait_share']:.0%}")
    words.append(f"{values['memory_bytes'] / 1e9:.2f} GB")
    if values["skipped_steps"]:
        words.append(f"SKIPPED {values['skipped_steps']:.0f} steps (gradients not finite)")
    return ", ".join(words)

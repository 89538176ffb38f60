"""An arm that mixes the base with a second language model of its vocabulary: `--ensemble NAME=DIR`.

What a memory has to be compared with where its gain may be that of any second opinion: two models that err at
different tokens are better together than each alone.

n positions of a block, J tokens asked for at a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.stages.evaluation.arms.arm import Arm, Part, Price, Scores, sum_of_logs
from mlpmem_ds.stages.evaluation.arms.base import Context, bytes_of_source, num_parameters
from mlpmem_ds.stages.evaluation.arms.model import open_source, tokens_of_training
from mlpmem_ds.stages.evaluation.config import Config, named_directories
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan


@dataclass(frozen=True, kw_only=True, eq=False)
class EnsembleArm(Arm):
    """The base mixed with another language model, which reads the same text on its own."""

    name: str
    forward_pass: ForwardPass
    second: ForwardPass
    """the other model's"""
    price: Price
    inputs: Mapping[str, str]
    description: str = "the base mixed with a second language model, both read the text"
    part: Part = "control"
    settings: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)

    def score(self, scan: Scan) -> Scores:
        tokens_n2 = np.stack([scan.values_n, scan.top_ids_n], axis=1)
        scores_n2 = self.second.score_tokens(scan.corpus, scan.block, tokens_n2)
        return Scores(values=scores_n2[:, 0].copy(), guesses=scores_n2[:, 1].copy())


def open_arms(config: Config, context: Context) -> list[EnsembleArm]:
    """The models of `--ensemble`. See `base.Opener`."""
    directories = named_directories(config.ensemble, flag="--ensemble")
    return [_open_ensemble(root, name, config, context) for name, root in directories.items()]


def _open_ensemble(root: Path, name: str, config: Config, context: Context) -> EnsembleArm:
    base, arm = context.base, f"base+{name}"
    source, sha256 = open_source(root, f"--ensemble {name}", config, context)
    return EnsembleArm(
        name=arm,
        forward_pass=base.forward_pass,
        second=ForwardPass(source=source, name=name, batch_windows=config.batch_windows),
        price=base.price.plus(
            parameters=num_parameters(source),
            bytes=bytes_of_source(str(root), source),
            seconds=sum_of_logs([root]),
            tokens=tokens_of_training(root),
        ),
        inputs={arm: sha256},
    )

"""A new kind of arm is a class and a function that opens it: no loop over arms asks for its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.formats.evaluation import read_evaluation
from mlpmem_ds.stages.evaluation import evaluate, inputs
from mlpmem_ds.stages.evaluation.arms.arm import Arm, Part, Price, Scores
from mlpmem_ds.stages.evaluation.arms.base import Context
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan

from ..conftest import read_scores

SHARES = (0.5, 0.9)


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyingArm(Arm):
    """Adds to the true token's probability a share of what it lacks to one; a column for each share."""

    name: str = "base+copy"
    description: str = "the base mixed with an oracle"
    part: Part = "control"
    forward_pass: ForwardPass
    price: Price
    inputs: Mapping[str, str] = field(default_factory=lambda: {"copy": "0" * 64})
    settings: Mapping[str, Any] = field(default_factory=lambda: {"shares": list(SHARES)})
    resolved: Mapping[str, Any] = field(default_factory=dict)
    choices: Sequence[Mapping[str, float]] = tuple({"share": share} for share in SHARES)

    def score(self, scan: Scan) -> Scores:
        p_n = np.exp(scan.log_probabilities_n)
        values_nT = np.log(np.stack([p_n + share * (1 - p_n) for share in SHARES], axis=1))
        return Scores(values=values_nT, guesses=np.repeat(scan.guesses_n3[:, :1], len(SHARES), axis=1))


def test_an_arm_of_a_new_kind_is_scored_chosen_and_reported(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_arms(_: Config, context: Context) -> list[CopyingArm]:
        price = context.base.price.plus(bytes=5, seconds=None, tokens=None)
        return [CopyingArm(forward_pass=context.base.forward_pass, price=price)]

    monkeypatch.setattr(inputs, "OPENERS", (*inputs.OPENERS, open_arms))
    config = replace(config, keys=None, index=None, targets=None, control=(), samples=0)
    table = evaluate.run(config, World())
    evaluation = read_evaluation(config.output)
    assert [arm.name for arm in evaluation.arms] == ["base", "base+memory", "base+copy"]
    arm = evaluation.arm("base+copy")
    assert (arm.lmbda, arm.chosen, arm.tried) == (1.0, {"share": 0.9}, {"share": SHARES})
    base = read_scores(config.output, "test", "base").astype(np.float64)
    expected = -np.log(np.exp(base) + 0.9 * (1 - np.exp(base))).mean()
    assert arm.ppl == pytest.approx(math.exp(expected), rel=1e-6)
    assert arm.bytes == evaluation.base.bytes + 5 and arm.win_rate == 1.0
    assert evaluation.wins == {"base+copy": False}
    page = (config.output / "report.md").read_text()
    assert table is not None and "base+copy" in table
    assert "- `base+copy`: the base mixed with an oracle." in page
    assert "share 0.9 (of 0.5, 0.9; the largest that was tried)" in page

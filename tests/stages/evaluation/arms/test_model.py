"""Another language model in place of the base: text that it was trained on is refused where that is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.inputs import open_inputs

from ..conftest import save_baseline


@pytest.fixture
def alone(config: Config) -> Config:
    """Without what is made from the train split."""
    return replace(config, memory=(), keys=None, index=None, targets=None, control=())


@pytest.mark.parametrize("kind", ["base", "baseline"])
def test_the_text_that_a_control_was_trained_on_is_refused(
    alone: Config, base_dir: Path, corpus_dir: Path, tmp_path: Path, kind: Literal["base", "baseline"]
) -> None:
    model = save_baseline(base_dir, corpus_dir, tmp_path / "model", kind=kind)
    config = replace(alone, control=(f"tuned={model}",))
    said = "the train split is the text that tuned was made from .*or leave tuned out"
    for changes in ({"test_split": "train"}, {"tuning_split": "train"}, {"extra_splits": ("train",)}):
        with pytest.raises(UserError, match=said):
            evaluate.run(replace(config, **changes), World())
    assert not config.output.exists()
    assert [arm.name for arm in open_inputs(config, World()).arms] == ["base", "tuned"]  # of other splits


def test_a_control_from_elsewhere_is_judged_on_any_text(alone: Config, artifacts: Path) -> None:
    config = replace(alone, control=(f"tuned={artifacts / 'trained_on'}",), test_split="train")
    assert [arm.name for arm in open_inputs(config, World()).arms] == ["base", "tuned"]

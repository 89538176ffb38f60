"""The base: text that it was trained on is refused where that is known, as for every other arm."""

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


@pytest.mark.parametrize("kind", ["base", "baseline"])
def test_the_text_that_it_was_trained_on_is_refused(
    config: Config, base_dir: Path, corpus_dir: Path, tmp_path: Path, kind: Literal["base", "baseline"]
) -> None:
    model = save_baseline(base_dir, corpus_dir, tmp_path / "model", kind=kind)
    only = {"memory": (), "keys": None, "index": None, "targets": None, "control": ()}
    config = replace(config, model=str(model), **only)
    said = "the train split is the text that base was made from .*or give another --model"
    for changes in ({"test_split": "train"}, {"tuning_split": "train"}, {"extra_splits": ("train",)}):
        with pytest.raises(UserError, match=said):
            evaluate.run(replace(config, **changes), World())
    assert not config.output.exists()
    (Path(model) / "generation_config.json").write_text('{"max_new_tokens": 12345}')
    assert [arm.name for arm in open_inputs(config, World()).arms] == ["base"]  # of other splits

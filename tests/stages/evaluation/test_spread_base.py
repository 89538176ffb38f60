"""A base that is spread over devices is scored as one that lies on one: its head may lie anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass
from mlpmem_ds.stages.evaluation.inputs import open_inputs

POINT = CapturePoint(layer=-1)
LAYERS = ("transformer.h.0", "transformer.h.1")
PARTS = ("transformer.wte", "transformer.wpe", *LAYERS, "transformer.ln_f", "lm_head")


@pytest.mark.parametrize("device_map", ["auto", "head on disk"])
def test_scores_are_those_of_the_whole_base(
    base_dir: Path, corpus_dir: Path, tmp_path: Path, device_map: str
) -> None:
    """A head on disk stands for one on another GPU: its weights are elsewhere until they are used."""
    where = dict.fromkeys(PARTS, "cpu") | {"lm_head": "disk", "transformer.wte": "disk"}
    spread = TransformersSource(
        str(base_dir),
        device_map=device_map if device_map == "auto" else where,
        offload_folder=tmp_path / "offload",
    )
    corpus, block = open_corpus(corpus_dir, "test"), Block(3, 90)
    found, expected = (
        ForwardPass(source=source, name=None, batch_windows=2).scan(corpus, block, [POINT])
        for source in (spread, TransformersSource(str(base_dir)))
    )
    np.testing.assert_array_equal(found.log_probabilities_n, expected.log_probabilities_n)
    np.testing.assert_array_equal(found.guesses_n3, expected.guesses_n3)
    np.testing.assert_array_equal(found.states[POINT].numpy(), expected.states[POINT].numpy())


def test_the_flag_reaches_base_and_controls(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, init = [], TransformersSource.__init__

    def record(self: TransformersSource, path: str, **settings: object) -> None:
        loaded.append(settings["device_map"])
        init(self, path, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformersSource, "__init__", record)
    open_inputs(replace(config, keys=None, index=None, targets=None, device_map="auto"), World())
    assert len(loaded) > 1 and set(loaded) == {"auto"}

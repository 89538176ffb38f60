"""A base that is spread over devices is scored as one that lies on one: its head may lie anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.logit_transform import LogitTransform
from mlpmem_ds.models.quantized import Int8Linear
from mlpmem_ds.models.shared_head import SharedHead
from mlpmem_ds.stages.evaluation.arms.memory import MemoryArm, _float_scores
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


def test_a_memory_that_shares_a_head_on_disk_says_the_same(base_dir: Path, tmp_path: Path) -> None:
    where = dict.fromkeys(PARTS, "cpu") | {"lm_head": "disk", "transformer.wte": "disk"}
    hidden_nH, tokens_nJ = torch.randn(5, 16), torch.arange(10).reshape(5, 2)
    scores, logits = [], []
    for device_map in (None, where):
        source = TransformersSource(str(base_dir), device_map=device_map, offload_folder=tmp_path / "offload")
        head = SharedHead(LogitTransform(scale=2.0, softcap=None))
        head.use(source.model.get_output_embeddings())
        assert head.weight.is_meta == (device_map is not None)
        scores.append(_float_scores(head, hidden_nH, tokens_nJ))
        logits.append(head(hidden_nH))
    assert torch.equal(scores[0].log_probabilities_NJ, scores[1].log_probabilities_NJ)
    assert torch.equal(*logits)


def test_the_flag_reaches_base_and_controls(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, init = [], TransformersSource.__init__

    def record(self: TransformersSource, path: str, **settings: object) -> None:
        loaded.append(settings["device_map"])
        init(self, path, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformersSource, "__init__", record)
    open_inputs(replace(config, keys=None, index=None, targets=None, device_map="auto"), World())
    assert len(loaded) > 1 and set(loaded) == {"auto"}


def test_an_int8_memory_beside_a_spread_base_says_the_same(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies whole on the device of the rank, whatever the map does with the base."""
    where = dict.fromkeys(PARTS, "cpu") | {"lm_head": "disk", "transformer.wte": "disk"}
    init = TransformersSource.__init__

    def spread(self: TransformersSource, path: str, **settings: object) -> None:
        if settings["device_map"] == "auto":
            settings |= {"device_map": where, "offload_folder": tmp_path / "offload"}
        init(self, path, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformersSource, "__init__", spread)
    config = replace(config, keys=None, index=None, targets=None, control=(), memory_weights="int8")
    scores, logits = [], []
    for device_map in ("none", "auto"):
        inputs = open_inputs(replace(config, device_map=device_map), World())
        (arm,), corpus = inputs.playing("subject"), inputs.splits["test"].corpus
        assert isinstance(arm, MemoryArm) and isinstance(arm.memory.head, Int8Linear)
        assert hasattr(inputs.base.source.model, "hf_device_map") == (device_map == "auto")
        scores.append(arm.score(arm.forward_pass.scan(corpus, Block(0, 70), arm.reads)).values)
        tokens = torch.from_numpy(corpus.tokens(0, 9).astype(np.int64))[None]
        with torch.no_grad():
            logits.append(arm.joint_model(0.4, {})(tokens).logits.numpy())
    np.testing.assert_array_equal(*scores)
    np.testing.assert_array_equal(*logits)

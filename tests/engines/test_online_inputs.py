"""Inputs of a base that runs next to the training: the rows asked for, and a base that the ranks hold
together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.engines.hidden_states import BatchStates
from mlpmem_ds.engines.online_inputs import OnlineInputs
from mlpmem_ds.formats.corpus import CorpusSplit, open_corpus
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.models.capture_point import CapturePoint

from ..conftest import with_begin_tokens

POINT = CapturePoint(layer=0)


class CountedSource:
    """States that name the token and its place in the window; how often it was read."""

    num_layers, width, vocab_size, max_context, dtype_name = 1, 2, 300, 64, "float32"

    def __init__(self, *, is_collective: bool) -> None:
        self.is_collective, self.num_reads = is_collective, 0

    def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
        self.num_reads += 1
        places_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        states_BSD = torch.stack([tokens_BS, places_BS], dim=2).float()
        return BatchStates(states=dict.fromkeys(points, states_BSD), final_BSD=states_BSD)

    def log_probabilities(self, final_ND: torch.Tensor, values_N: torch.Tensor) -> np.ndarray:
        raise AssertionError("inputs need none")


@pytest.fixture(scope="module")
def corpus(corpus_dir: Path) -> CorpusSplit:
    return open_corpus(corpus_dir)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_run_a_base_that_they_hold_together_equally_often(corpus: CorpusSplit, size: int) -> None:
    """The ranks' parts lie on different numbers of windows; the rows do not change."""
    order = TrainingOrder(
        num_positions=corpus.num_positions,
        block_size=corpus.block_size,
        window_blocks=1,
        seed=0,
        by_block=True,
    )
    share, batches = 50, corpus.num_positions // (50 * size)
    own = np.zeros((batches, size), int)
    padded = np.zeros((batches, size), int)
    for batch in range(batches):
        runs = order.runs(batch, share * size, size=size)
        for rank in range(size):
            alone, together = CountedSource(is_collective=False), CountedSource(is_collective=True)
            expected = OnlineInputs(alone, corpus, POINT, batch_windows=1)(runs[rank])
            found = OnlineInputs(together, corpus, POINT, batch_windows=1)(runs[rank], runs)
            assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
            tokens = [corpus.tokens(*run) for run in runs[rank]]
            assert torch.equal(found[:, 0], torch.from_numpy(np.concatenate(tokens)).bfloat16())
            own[batch, rank], padded[batch, rank] = alone.num_reads, together.num_reads
    assert (own.min(axis=1) < own.max(axis=1)).any(), "the ranks never differ: nothing is shown"
    np.testing.assert_array_equal(padded, np.repeat(own.max(axis=1, keepdims=True), size, axis=1))


@pytest.mark.parametrize("num_begin", [1, 2])
def test_begin_tokens_are_read_and_dropped(corpus_dir: Path, tmp_path: Path, num_begin: int) -> None:
    plain = open_corpus(corpus_dir)
    begin = tuple(plain.tokens(16, 16 + num_begin).tolist())  # as one window begins
    corpus = open_corpus(with_begin_tokens(corpus_dir, tmp_path / "begun", begin))
    runs = [Block(0, 90), Block(100, 130)]
    found = OnlineInputs(CountedSource(is_collective=False), corpus, POINT, batch_windows=3)(runs)
    expected = OnlineInputs(CountedSource(is_collective=False), plain, POINT, batch_windows=3)(runs)
    assert torch.equal(found[:, 0], expected[:, 0])  # the same tokens
    shifts = (found[:, 1] - expected[:, 1]).int().tolist()  # one place on, or where they were
    assert set(shifts) == {0, num_begin}


def test_inputs_stay_where_the_base_computes_them(corpus: CorpusSplit) -> None:
    """A meta tensor has no content: a trip to the host and back would fail."""

    class Source(CountedSource):
        def read(self, tokens_BS: torch.Tensor, points: Mapping[str, CapturePoint]) -> BatchStates:
            batch = super().read(tokens_BS, points)
            states = {name: state_BSD.to("meta") for name, state_BSD in batch.states.items()}
            return BatchStates(states=states, final_BSD=batch.final_BSD)

    inputs = OnlineInputs(Source(is_collective=False), corpus, POINT, batch_windows=2)
    found = inputs([Block(3, 90), Block(100, 130)])
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.bfloat16, (117, 2))

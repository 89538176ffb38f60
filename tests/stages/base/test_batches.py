"""Sequences of a base's training: begin tokens once before each, and no loss of what follows most of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.base.batches import SequenceBatches, Sequences
from mlpmem_ds.stages.base.objective import NextTokenModule

LENGTH = 6


@pytest.mark.parametrize("begin", [(), (0,), (0, 1)])
def test_each_sequence_begins_as_a_document(begin: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    documents = [[*begin, *generator.integers(3, 50, 9).tolist(), 2] for _ in range(30)]
    tokens = np.concatenate([np.array(document) for document in documents])
    sequences = Sequences(tokens=tokens, length=LENGTH, seed=1, begin=begin)
    plain = Sequences(tokens=tokens, length=LENGTH, seed=1)
    moved = 0
    for epoch in range(4):
        found, bare = (each.batch(epoch, 0, each.per_epoch) for each in (sequences, plain))
        assert found.shape == (plain.per_epoch, len(begin) + LENGTH + 1)
        assert (found[:, : len(begin)] == begin).all()
        text = found[:, len(begin) :]
        for row, (own, given) in enumerate(zip(text.tolist(), bare.tolist(), strict=True)):
            if begin and tuple(given[: len(begin)]) == begin:
                moved += 1
                assert own[: -len(begin)] == given[len(begin) :], row
            else:
                assert own == given
    assert bool(moved) == bool(begin)


def test_a_rank_reads_its_own_sequences_alone() -> None:
    """In the order of the step: every size-th."""

    class Read:
        """Tokens that note which of them are asked for."""

        def __init__(self, tokens: np.ndarray) -> None:
            self.tokens, self.num_read = tokens, 0

        def __len__(self) -> int:
            return len(self.tokens)

        def __getitem__(self, positions: np.ndarray) -> np.ndarray:
            self.num_read += positions.size
            return self.tokens[positions]

    tokens = np.random.default_rng(0).integers(3, 50, 300)

    def of_rank(rank: int, size: int) -> tuple[list[np.ndarray], int]:
        read: Any = Read(tokens)
        batches = SequenceBatches(
            sequences=Sequences(tokens=read, length=LENGTH, seed=1, begin=()),
            per_step=8,
            num_micro_batches=1,
            world=World(rank=rank, size=size),
        )
        return [parts[0].numpy() for parts, _ in batches.stream(0, 9)], read.num_read

    whole, num_read = of_rank(0, 1)
    for rank in range(4):
        mine, num_mine = of_rank(rank, 4)
        assert all(np.array_equal(own, step[rank::4]) for own, step in zip(mine, whole, strict=True))
        assert 4 * num_mine == num_read


def test_the_loss_is_that_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5)
    model = GPT2LMHeadModel(shape).eval()
    tokens_BT = torch.randint(50, (3, 2 + LENGTH + 1))
    (loss,) = NextTokenModule(model, num_begin_tokens=2)(tokens_BT)
    log_p_BSV = model(tokens_BT).logits.double().log_softmax(-1)[:, 2:-1]
    expected = -log_p_BSV.gather(2, tokens_BT[:, 3:, None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_does_not_count_is_read_and_not_learnt() -> None:
    """Tokens that come as their complements; of any batch, a token that counts weighs the same."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5)
    model = GPT2LMHeadModel(shape).eval()
    tokens_BT = torch.randint(50, (3, 1 + LENGTH + 1))
    is_learnt_BT = torch.rand(tokens_BT.shape) < 0.4
    given_BT = torch.where(is_learnt_BT, tokens_BT, ~tokens_BT)
    (loss,) = NextTokenModule(model, num_begin_tokens=1, learnt_share=0.5)(given_BT)
    log_p_BSV = model(tokens_BT).logits.double().log_softmax(-1)[:, 1:-1]
    losses_BS = -log_p_BSV.gather(2, tokens_BT[:, 2:, None])[..., 0]
    expected = (losses_BS * is_learnt_BT[:, 2:]).sum() / (losses_BS.numel() * 0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sequences_of_complements_are_those_of_the_text() -> None:
    tokens = np.random.default_rng(0).integers(3, 50, 300)
    tokens[::10] = 0
    hidden = np.where(np.arange(300) % 3 == 0, ~tokens, tokens)
    for begin in ((), (0,)):
        plain, given = (
            Sequences(tokens=each, length=LENGTH, seed=1, begin=begin).batch(0, 0, 40)
            for each in (tokens, hidden)
        )
        assert np.array_equal(np.where(given < 0, ~given, given), plain)

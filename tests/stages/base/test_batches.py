"""Sequences of a base's training: begin tokens once before each, and no loss of what follows most of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mlpmem_ds.stages.base.batches import Sequences
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


def test_the_loss_is_that_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5)
    model = GPT2LMHeadModel(shape).eval()
    tokens_BT = torch.randint(50, (3, 2 + LENGTH + 1))
    (loss,) = NextTokenModule(model, num_begin_tokens=2)(tokens_BT)
    log_p_BSV = model(tokens_BT).logits.double().log_softmax(-1)[:, 2:-1]
    expected = -log_p_BSV.gather(2, tokens_BT[:, 3:, None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

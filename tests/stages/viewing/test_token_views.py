"""What is said of each token, against the parts of the joint model in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.mixture import Constant
from mlpmem_ds.stages.viewing import token_views
from mlpmem_ds.stages.viewing.token_views import mixture_weights, views_of

from .conftest import LAMBDA

TEXT = "alpha beta return value in range import é gamma"


@torch.no_grad()
def test_the_views_are_what_the_parts_say(export_dir: Path) -> None:
    model = MemoryAugmentedLM.from_pretrained(export_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    ids = tokenizer(TEXT)["input_ids"]
    views = views_of(model, tokenizer, ids, num_top=3)
    assert "".join(view.text for view in views) == tokenizer.decode(ids)
    assert views[0].opinion is None
    point = CapturePoint(layer=0)
    states_SD = capture(model.base, [point])(torch.tensor([ids])).states[point][0]
    base_SV = model.base(torch.tensor([ids])).logits[0].double().softmax(-1).numpy()
    memory_SV = model.memory.head(model.memory(states_SD)).double().softmax(-1).numpy()
    for place, (token, view) in enumerate(zip(ids[1:], views[1:], strict=True)):
        opinion = view.opinion
        assert opinion is not None
        base_V, memory_V = base_SV[place], memory_SV[place]
        joint = (1 - LAMBDA) * base_V[token] + LAMBDA * memory_V[token]
        found = (opinion.base, opinion.memory, opinion.joint, opinion.weight)
        assert found == pytest.approx((base_V[token], memory_V[token], joint, LAMBDA), rel=1e-3)
        assert opinion.base_is_right == (base_V.argmax() == token)
        assert opinion.memory_is_right == (memory_V.argmax() == token)
        best = [tokenizer.decode([int(best)]) for best in np.argsort(-memory_V)[:3]]
        assert [candidate.text for candidate in opinion.memory_top] == best
    assert model.gate == Constant(LAMBDA) and model.config.lmbda == LAMBDA


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("num_context", [0, 3])
def test_blocks_of_a_long_text_say_the_same(
    size: int, num_context: int, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MemoryAugmentedLM.from_pretrained(export_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    ids = tokenizer(TEXT)["input_ids"]
    whole = views_of(model, tokenizer, ids, num_context=num_context)
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, given: counts.append(len(given["logits_to_keep"])), with_kwargs=True
    )
    monkeypatch.setattr(token_views, "_HELD_PROBABILITIES", 3 * 300 * size + 2)
    blocks = views_of(model, tokenizer, ids, num_context=num_context)
    assert max(counts) == size and sum(counts) == 3 * (len(ids) - max(num_context, 1))
    assert [view.text for view in blocks] == [view.text for view in whole]
    for one, other in zip(blocks, whole, strict=True):
        assert (one.opinion is None) == (other.opinion is None)
        if one.opinion is not None and other.opinion is not None:
            found, expected = (
                [each.base, each.memory, each.joint, each.weight] for each in (one.opinion, other.opinion)
            )
            assert found == pytest.approx(expected, rel=1e-4)
            assert one.opinion.base_is_right == other.opinion.base_is_right
            assert [top.text for top in one.opinion.memory_top] == [
                top.text for top in other.opinion.memory_top
            ]


def test_what_is_only_looked_at_is_not_counted(export_dir: Path) -> None:
    model = MemoryAugmentedLM.from_pretrained(export_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    model.base_only_threshold = 1.0
    model(torch.tensor([[5, 6, 7]]))
    before = copy.copy(model.base_only)
    views_of(model, tokenizer, [5, 6, 7])
    assert model.base_only == before and before.skipped_rows == 3


def test_context_is_read_and_not_shown(export_dir: Path) -> None:
    model = MemoryAugmentedLM.from_pretrained(export_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    ids = tokenizer(TEXT)["input_ids"]
    whole = views_of(model, tokenizer, ids)
    assert views_of(model, tokenizer, ids, num_context=3) == whole[3:]


def test_the_weights_of_a_bank_are_found_from_its_mixture() -> None:
    draw = np.random.default_rng(0)
    base_V, *memories_MV = draw.dirichlet(np.ones(40), size=4)
    weights_M = np.array([0.2, 0.0, 0.5])
    joint_V = (1 - weights_M.sum()) * base_V + weights_M @ np.stack(memories_MV)
    np.testing.assert_allclose(mixture_weights(base_V, memories_MV, joint_V), weights_M, atol=1e-12)


def test_a_memory_that_says_what_the_base_says_has_no_weight() -> None:
    base_V = np.full(10, 0.1)
    assert mixture_weights(base_V, [base_V], base_V).tolist() == [0.0]

"""The logits processor: rows of a batch that changes at random keep the λ of their requests."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlpmem_ds.serving.request_weights import STEP

from .conftest import BatchUpdate, MoveDirectionality


def params(lmbda: float | None, prompt_logprobs: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        extra_args=None if lmbda is None else {"lmbda": lmbda}, prompt_logprobs=prompt_logprobs
    )


def make(vllm: SimpleNamespace) -> Any:
    return vllm.vllm_requests.RequestLambda(None, torch.device("cpu"), False)


def test_each_step_gets_the_weights_of_its_rows(vllm: SimpleNamespace) -> None:
    processor = make(vllm)
    added = [(0, params(0.2), None, []), (1, params(None), None, [])]
    processor.update_state(BatchUpdate(2, [], added, []))
    assert STEP.take(2).tolist() == pytest.approx([0.2, math.nan], nan_ok=True)
    processor.update_state(None)  # the same rows
    assert STEP.take(2).tolist() == pytest.approx([0.2, math.nan], nan_ok=True)
    processor.update_state(BatchUpdate(1, [0], [], [(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert STEP.take(1) is None  # the one that is left named none


def test_random_batches_agree_with_a_list_of_requests(vllm: SimpleNamespace) -> None:
    generator, processor = random.Random(3), make(vllm)
    rows: dict[int, float | None] = {}
    for _ in range(300):
        gone = [row for row in rows if generator.random() < 0.2]
        for row in gone:
            del rows[row]
        added = []
        for _ in range(generator.randrange(3)):
            row = next(number for number in range(99) if number not in rows)
            rows[row] = generator.choice([None, 0.0, generator.random()])
            added.append((row, params(rows[row]), None, []))
        moved = []
        while rows and max(rows) >= len(rows):  # no gaps: the last one comes to the first free row
            free = next(number for number in range(99) if number not in rows)
            moved.append((max(rows), free, MoveDirectionality.UNIDIRECTIONAL))
            rows[free] = rows.pop(max(rows))
        if len(rows) > 1 and generator.random() < 0.5:
            first, second = generator.sample(sorted(rows), 2)
            moved.append((first, second, MoveDirectionality.SWAP))
            rows[first], rows[second] = rows[second], rows[first]
        is_same = not (gone or added or moved)
        processor.update_state(None if is_same else BatchUpdate(len(rows), gone, added, moved))
        taken = STEP.take(len(rows))
        expected = [math.nan if rows[row] is None else rows[row] for row in range(len(rows))]
        if all(lmbda is None for lmbda in rows.values()):
            assert taken is None
        else:
            assert taken.tolist() == pytest.approx(expected, nan_ok=True)


def test_a_wrong_weight_and_logprobs_of_a_prompt_are_refused(vllm: SimpleNamespace) -> None:
    check = vllm.vllm_requests.RequestLambda.validate_params
    check(params(None))
    check(params(None, prompt_logprobs=1))
    check(params(0.5))
    with pytest.raises(ValueError, match="a number in"):
        check(params(1.5))
    with pytest.raises(ValueError, match="leave out lmbda"):
        check(params(0.5, prompt_logprobs=0))


def test_logits_stay(vllm: SimpleNamespace) -> None:
    logits = torch.randn(2, 5)
    assert make(vllm).apply(logits) is logits
    assert make(vllm).is_argmax_invariant()

"""What gates read: confidences against their definition, histories against a plain loop in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mlpmem_ds.models.gate_features import (
    History,
    confidences,
    confidences_of,
    join_confidences,
    num_confidences,
)


def log_probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return -5 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_a_loop(
    history: History, log_base_S: torch.Tensor, log_memories_SM: torch.Tensor, segments_S: list[int]
) -> list[list[float]]:
    """The states of one text, as the definition reads."""
    state, found = [0.0] * history.size, []
    for position, segment in enumerate(segments_S):
        if position and segment != segments_S[position - 1]:
            state = [0.0] * history.size
        found.append(state)
        base = float(log_base_S[position])
        ratios = [float(memory) - base for memory in log_memories_SM[position]]
        news = [max(-20.0, min(20.0, ratio)) for ratio in ratios for _ in history.ratio_decays]
        news += [max(-20.0, base)] * len(history.base_decays)
        decays = history.ratio_decays * history.num_memories + history.base_decays
        state = [d * old + (1 - d) * new for d, old, new in zip(decays, state, news, strict=True)]
    return found


@pytest.mark.parametrize("num_memories", [1, 3])
def test_histories_are_those_of_a_plain_loop_over_documents(num_memories: int) -> None:
    history = History(num_memories=num_memories)
    assert history.size == 3 * num_memories + 1
    log_base_S, log_memories_SM = log_probabilities(700), log_probabilities(700, num_memories, seed=1)
    lengths = [1, 5, 122, 1, 1, 300, 128, 142]  # over and upon the edges of chunks
    segments = [number for number, length in enumerate(lengths) for _ in range(length)]
    wanted = torch.tensor(by_a_loop(history, log_base_S, log_memories_SM, segments), dtype=torch.float64)
    found, last = history.along(log_base_S, log_memories_SM, segments=torch.tensor(segments))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        last, history.update(found[-1], log_base_S[-1], log_memories_SM[-1]), rtol=0, atol=1e-13
    )
    one_text, _ = history.along(log_base_S, log_memories_SM)
    wanted = torch.tensor(by_a_loop(history, log_base_S, log_memories_SM, [0] * 700), dtype=torch.float64)
    torch.testing.assert_close(one_text, wanted, rtol=0, atol=1e-13)


def test_a_batch_goes_on_where_its_prompt_ended_and_sees_no_padding() -> None:
    history = History(num_memories=2)
    log_base_BS, log_memories_BSM = log_probabilities(3, 200).float(), log_probabilities(3, 200, 2).float()
    padding = [0, 7, 130]
    segments_BS = torch.stack([(torch.arange(200) >= number).long() for number in padding])
    states_BSH, last_BH = history.along(log_base_BS, log_memories_BSM, segments=segments_BS)
    for row, number in enumerate(padding):
        state_H = history.start()
        for position in range(number, 200):
            torch.testing.assert_close(states_BSH[row, position], state_H, rtol=0, atol=1e-5)
            state_H = history.update(state_H, log_base_BS[row, position], log_memories_BSM[row, position])
        torch.testing.assert_close(last_BH[row], state_H, rtol=0, atol=1e-5)
    first, state = history.along(log_base_BS[:, :90], log_memories_BSM[:, :90])
    second, last = history.along(log_base_BS[:, 90:], log_memories_BSM[:, 90:], history=state)
    whole, wanted = history.along(log_base_BS, log_memories_BSM)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(last, wanted, rtol=0, atol=1e-5)
    assert whole.dtype == torch.float32 and torch.equal(history.start(3), torch.zeros(3, 7))


def test_an_impossible_token_is_bounded() -> None:
    history = History(ratio_decays=(0.5,), base_decays=(0.0,))
    state = history.update(history.start(), torch.tensor(-1.0), torch.tensor([-math.inf]))
    assert state.tolist() == [-10.0, -1.0]
    state = history.update(state, torch.tensor(-math.inf), torch.tensor([-1.0]))
    assert state.tolist() == [5.0, -20.0]
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="decays"):
            History(ratio_decays=(wrong,))


def test_a_token_without_a_number_adds_nothing_and_spoils_no_other() -> None:
    """Impossible for both, or given by numbers that overflowed: in its text, before and behind it."""
    history = History(num_memories=2)
    log_base_S, log_memories_SM = log_probabilities(300), log_probabilities(300, 2, seed=1)
    segments_S = (torch.arange(300) >= 150).long()
    counted_S, counted_SM = log_base_S.clone(), log_memories_SM.clone()
    log_base_S[100], log_memories_SM[100] = -math.inf, torch.tensor([-math.inf, -1.0])
    counted_S[100], counted_SM[100] = -20.0, torch.tensor([-20.0, 0.0])
    log_base_S[160], log_memories_SM[160] = math.nan, math.nan
    counted_S[160], counted_SM[160] = 0.0, 0.0
    wanted = torch.tensor(by_a_loop(history, counted_S, counted_SM, segments_S.tolist()), dtype=torch.float64)
    found, _ = history.along(log_base_S, log_memories_SM, segments=segments_S)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    for place in (100, 160):
        state_H = history.update(found[place], log_base_S[place], log_memories_SM[place])
        torch.testing.assert_close(state_H, wanted[place + 1], rtol=0, atol=1e-13)


def test_confidences_are_entropy_certainty_and_agreement() -> None:
    generator = torch.Generator().manual_seed(2)
    base, one, two = 3 * torch.randn(3, 4, 9, generator=generator)
    one[0] = base[0]
    base[1, 3] = one[1, 3] = -math.inf  # a token that is never given
    found = confidences(base, (one, two))
    assert found.shape == (4, num_confidences(2)) and found.dtype == torch.float32
    p_base = base.double().softmax(-1)
    place = p_base.argmax(-1, keepdim=True)
    columns = []
    for logits in (base, one, two):
        p = logits.double().softmax(-1)
        columns += [-torch.where(p > 0, p * p.log(), 0.0).sum(-1), p.amax(-1).log()]
        if logits is not base:
            columns += [(p.argmax(-1) == place[:, 0]).double(), p.gather(-1, place)[:, 0].log()]
    torch.testing.assert_close(found.double(), torch.stack(columns, -1), rtol=1e-5, atol=1e-5)
    assert found[0, 4] == 1 and bool(torch.isfinite(found).all())
    joined = join_confidences(found[:, :2], [found[:, 2:6], found[:, 6:]])
    assert torch.equal(joined, found)


def test_what_remains_of_a_state_is_all_that_the_start_adds_to_later_ones() -> None:
    history, start_H = History(), torch.tensor([3.0, -2.0, 1.0, -4.0], dtype=torch.float64)
    log_base_S, log_memories_SM = log_probabilities(9), log_probabilities(9, 1, seed=1)
    from_start, _ = history.along(log_base_S, log_memories_SM, history=start_H)
    from_zero, _ = history.along(log_base_S, log_memories_SM)
    remaining = history.remaining(start_H.expand(9, -1), torch.arange(9))
    torch.testing.assert_close(from_zero + remaining, from_start)


def test_an_entropy_is_that_of_the_definition_where_tokens_are_impossible() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits[1, 7:] = -math.inf
    logits[2, 1:] = -math.inf
    found = confidences(logits, (logits.flip(0),))
    p = logits.softmax(-1)
    entropies = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    torch.testing.assert_close(found[:, 0], entropies.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[:, 2], entropies.flip(0).float(), rtol=1e-6, atol=1e-7)
    logs = [each.float().log_softmax(-1) for each in (logits, logits.flip(0))]
    assert torch.equal(confidences_of(logs), found)

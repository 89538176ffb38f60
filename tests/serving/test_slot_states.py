"""Slots of past tokens, in made-up block tables, against lists."""

import random

import torch

from mlpmem_ds.serving.slot_states import Chunks, SlotStates

BLOCK_SIZE = 4


def test_each_token_finds_those_before_it_in_its_text() -> None:
    generator = random.Random(2)
    for _ in range(30):
        num_requests = generator.randrange(1, 6)
        lengths = [generator.randrange(1, 19) for _ in range(num_requests)]
        news = [generator.randrange(0, length + 1) for length in lengths]
        news[-1] = max(news[-1], 1)
        numbers = generator.sample(range(1, 200), 5 * num_requests)
        tables = [numbers[5 * request : 5 * request + 5] for request in range(num_requests)]
        texts = [
            [table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for place in range(length)]
            for table, length in zip(tables, lengths, strict=True)
        ]
        tokens = [
            (request, place)
            for request, (length, new) in enumerate(zip(lengths, news, strict=True))
            for place in range(length - new, length)
        ]
        chunks = Chunks(
            ends=torch.tensor([sum(news[:count]) for count in range(num_requests + 1)], dtype=torch.int32),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            slots=torch.tensor([texts[request][place] for request, place in tokens]),
            blocks=torch.tensor(tables, dtype=torch.int32),
            block_size=BLOCK_SIZE,
            num_tokens=len(tokens),
        )
        assert chunks.requests.tolist() == [request for request, _ in tokens]
        assert chunks.positions.tolist() == [place for _, place in tokens]
        assert torch.equal(chunks.slots_before(0), chunks.slots)
        for steps in (1, 2, 7):
            expected = [texts[request][place - steps] if place >= steps else -1 for request, place in tokens]
            assert chunks.slots_before(steps).tolist() == expected


def test_requests_that_only_fill_up_a_step_have_no_tokens() -> None:
    chunks = Chunks(
        ends=torch.tensor([0, 0, 2, 2, 2]),
        lengths=torch.tensor([0, 9, 0, 0]),
        slots=torch.tensor([31, 32, -1]),
        blocks=torch.tensor([[0, 0], [7, 8], [0, 0], [0, 0]]),
        block_size=8,
        num_tokens=2,
    )
    assert chunks.requests.tolist() == [1, 1]
    assert chunks.positions.tolist() == [7, 8]
    assert chunks.slots_before(1).tolist() == [62, 63]


def test_slots_of_a_cache_that_is_not_dense_are_written_and_read() -> None:
    whole = torch.zeros(5, 2, BLOCK_SIZE, 3)
    states = SlotStates(whole[:, 1])
    values = torch.randn(3, 3)
    states.write(torch.tensor([9, 4, -1]), values)
    assert torch.equal(whole[2, 1, 1], values[0]) and torch.equal(whole[1, 1, 0], values[1])
    assert not whole[:, 0].any()
    assert torch.equal(
        states.read(torch.tensor([4, -1, 9])), torch.stack([values[1], values[0] * 0, values[0]])
    )
    states.write(torch.tensor([9]), torch.tensor([[5.0]]), start=2)
    assert whole[2, 1, 1].tolist() == [*values[0, :2].tolist(), 5.0]


def test_what_is_in_the_block_of_nobody_is_not_read() -> None:
    states = SlotStates(torch.full((2, BLOCK_SIZE, 3), torch.nan))
    assert torch.equal(states.read(torch.tensor([-1])), torch.zeros(1, 3))

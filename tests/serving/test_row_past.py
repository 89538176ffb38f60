"""What rows carry of the past, in steps of an engine, is what one straight pass over each text gives."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import torch

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gate_features import History
from mlpmem_ds.serving.kept_logits import KeptLogits
from mlpmem_ds.serving.row_layout import RowLayout
from mlpmem_ds.serving.row_past import LogitsOf, RowPast
from mlpmem_ds.serving.slot_states import Chunks, SlotStates

WIDTH, VOCAB, BLOCK_SIZE, NUM_BLOCKS = 6, 11, 4, 40
MIDDLE, LAST = CapturePoint(layer=2), CapturePoint(layer=3, point="final_norm")
HISTORY = History(num_memories=2)
HEADS = torch.randn(3, 3 * WIDTH, VOCAB, generator=torch.Generator().manual_seed(5))
Text = tuple[torch.Tensor, torch.Tensor]
"""own parts of the rows, tokens"""


def head(number: int) -> LogitsOf:
    """The base's, or a memory's."""

    def logits(final: torch.Tensor, states: Mapping[str, torch.Tensor]) -> torch.Tensor:
        read = final if number == 0 else states["a" if number == 1 else "b"]
        return read @ HEADS[number, : read.shape[-1]]

    return logits


def past_of(
    windows: Mapping[str, int], history: History | None, sampled: KeptLogits | None = None
) -> RowPast:
    layout = RowLayout(
        points={"a": MIDDLE, "b": LAST},
        width=WIDTH,
        windows=windows,
        history_size=0 if history is None else history.size,
    )
    models = [head(number) for number in range(3)]
    return RowPast(layout=layout, history=history, models=models, sampled=sampled)


def straight(past: RowPast, own_SO: torch.Tensor, ids_S: torch.Tensor) -> torch.Tensor:
    """The rows of a whole text, token by token."""
    history_H, rows = HISTORY.start(), []
    for place in range(len(ids_S)):
        before = [
            own_SO[place - steps] if place >= steps else torch.zeros_like(own_SO[0])
            for steps in range(1, past.layout.past + 1)
        ]
        if past.history is not None:
            if place:
                final, states, _ = past.layout.split(rows[-1])
                found = [each(final, states).log_softmax(-1)[ids_S[place]] for each in past.models]
                history_H = HISTORY.update(history_H, found[0], torch.stack(found[1:]))
            before.append(past.layout.pack(history_H, own_SO.dtype))
        rows.append(torch.cat([own_SO[place], *before]))
    return torch.stack(rows)


class Engine:
    """Texts in blocks of a cache, continued by random numbers of tokens in each step."""

    def __init__(self, past: RowPast, seed: int) -> None:
        self.past, self.random = past, random.Random(seed)
        torch.manual_seed(seed)
        shape = (NUM_BLOCKS, BLOCK_SIZE, past.slot_width(torch.float32) + 3)
        self.cache = SlotStates(torch.full(shape, torch.nan))
        self.free = list(range(1, NUM_BLOCKS))

    def run(self, texts: list[Text], tables: list[list[int]]) -> list[torch.Tensor]:
        """The rows of all texts. The blocks in `tables` are full already; the others are added to them."""
        done = [len(table) * BLOCK_SIZE for table in tables]
        rows: list[list[torch.Tensor]] = [[] for _ in texts]
        while any(done[number] < len(ids) for number, (_, ids) in enumerate(texts)):
            news = [
                self.random.randrange(0, min(9, len(ids) - done[n]) + 1) for n, (_, ids) in enumerate(texts)
            ]
            if not any(news):
                continue
            for number, new in enumerate(news):
                while len(tables[number]) * BLOCK_SIZE < done[number] + new:
                    tables[number].append(self.free.pop(self.random.randrange(len(self.free))))
            step = self._step(texts, tables, done, news)
            ends = [sum(news[:count]) for count in range(len(news) + 1)]
            for number, new in enumerate(news):
                rows[number] += step[ends[number] : ends[number + 1]]
                done[number] += new
        return [torch.stack(each) for each in rows]

    def _step(
        self, texts: list[Text], tables: list[list[int]], done: list[int], news: list[int]
    ) -> torch.Tensor:
        """The rows of the next tokens, `news` of each text, and of padding."""
        places = [(n, place) for n, new in enumerate(news) for place in range(done[n], done[n] + new)]
        slots = [
            tables[number][place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for number, place in places
        ]
        own = torch.stack([texts[number][0][place] for number, place in places])
        ids = torch.stack([texts[number][1][place] for number, place in places])
        num_padded = self.random.randrange(3)
        longest = max(map(len, tables))
        rows = self.past.extend(
            torch.cat([own, torch.full((num_padded, own.shape[1]), torch.nan)]),
            torch.cat([ids, torch.full((num_padded,), VOCAB - 1)]),
            Chunks(
                ends=torch.tensor([sum(news[:count]) for count in range(len(news) + 1)], dtype=torch.int32),
                lengths=torch.tensor([a + b for a, b in zip(done, news, strict=True)], dtype=torch.int32),
                slots=torch.tensor(slots + [-1] * num_padded),
                blocks=torch.tensor([[*table, *[0] * (longest - len(table))] for table in tables]),
                block_size=BLOCK_SIZE,
                num_tokens=len(places),
            ),
            self.cache,
        )
        if self.past.sampled is not None:
            self._sample(rows, news)
        return rows

    def _sample(self, rows: torch.Tensor, news: list[int]) -> None:
        """As an engine that asks for the logits of each text's last row."""
        lasts = [max(sum(news[: count + 1]) - 1, 0) for count in range(len(news))]
        assert self.past.sampled is not None
        final, states, _ = self.past.layout.split(rows[lasts])
        self.past.sampled.keep(rows[lasts], [each(final, states) for each in self.past.models])


def text_of(length: int, beginning: Text | None = None) -> Text:
    own, ids = torch.randn(length, 2 * WIDTH), torch.randint(0, VOCAB, (length,))
    if beginning is not None:
        own = torch.cat([beginning[0], own])
        ids = torch.cat([beginning[1], ids])
    return own, ids


CASES = [({}, HISTORY), ({"a": 3}, None), ({"a": 3, "b": 2}, HISTORY)]


def test_texts_in_chunks_have_the_rows_of_a_straight_pass() -> None:
    for seed, (windows, history) in enumerate(CASES * 4):
        past = past_of(windows, history, KeptLogits() if seed % 2 and history is not None else None)
        engine = Engine(past, seed)
        texts = [text_of(length) for length in (1, 17, 30, 8)]
        found = engine.run(texts, [[] for _ in texts])
        for rows, (own, ids) in zip(found, texts, strict=True):
            torch.testing.assert_close(rows, straight(past, own, ids), rtol=0, atol=1e-5)


def test_a_beginning_that_another_text_has_left_in_the_cache_is_gone_on_from() -> None:
    """Full blocks of an earlier request are in the tables of two later ones, and are not run again."""
    for seed, (windows, history) in enumerate(CASES):
        past = past_of(windows, history, KeptLogits() if history is not None else None)
        engine = Engine(past, seed)
        first = text_of(3 * BLOCK_SIZE)
        table: list[int] = []
        engine.run([first], [table])
        texts = [text_of(length, first) for length in (1, 14)]
        found = engine.run(texts, [list(table) for _ in texts])
        for rows, (own, ids) in zip(found, texts, strict=True):
            torch.testing.assert_close(rows, straight(past, own, ids)[len(first[1]) :], rtol=0, atol=1e-5)


def test_a_text_whose_numbers_overflowed_does_not_spoil_others() -> None:
    past = past_of({"a": 3}, HISTORY, KeptLogits())
    engine = Engine(past, 7)
    texts = [text_of(20) for _ in range(3)]
    texts[1][0][4:] = torch.nan
    found = engine.run(texts, [[] for _ in texts])
    for number in (0, 2):
        torch.testing.assert_close(found[number], straight(past, *texts[number]), rtol=0, atol=1e-5)


def test_rows_of_an_engine_that_measures_itself_are_those_of_first_tokens() -> None:
    for windows, history in CASES:
        past = past_of(windows, history)
        own, ids = text_of(5)
        expected = torch.cat([straight(past, own[[place]], ids[[place]]) for place in range(5)])
        assert torch.equal(past.begin(own, ids), expected)


def test_in_decoding_no_head_runs_for_the_history() -> None:
    """Each token's logits at the one before are those that the step before has sampled from."""
    rows_of_heads: list[int] = []

    def counted(model: LogitsOf) -> LogitsOf:
        def logits(final: torch.Tensor, states: Mapping[str, torch.Tensor]) -> torch.Tensor:
            rows_of_heads.append(len(final))
            return model(final, states)

        return logits

    for windows in ({}, {"a": 3, "b": 2}):
        plain = past_of(windows, HISTORY)
        past = replace(plain, models=[counted(each) for each in plain.models], sampled=KeptLogits())
        engine = Engine(past, 3)
        texts, tables = [text_of(9) for _ in range(3)], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        found: list[torch.Tensor] = []
        for start, stop, num_made in ((0, 5, 4), (5, 6, 0), (6, 7, 0), (7, 9, 1)):
            rows_of_heads.clear()
            step = engine._step(texts, tables, [start] * 3, [stop - start] * 3)
            found.append(step[: 3 * (stop - start)].view(3, stop - start, -1))
            # Of each text and model, and the row that is sampled from.
            assert sum(rows_of_heads) == 3 * 3 * (num_made + 1)
        for rows, (own, ids) in zip(torch.cat(found, dim=1), texts, strict=True):
            torch.testing.assert_close(rows, straight(past, own, ids), rtol=0, atol=1e-5)

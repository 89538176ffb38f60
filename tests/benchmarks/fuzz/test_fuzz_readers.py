"""The fuzz run finds what is planted for it; the readers as they are pass a few inputs of each kind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from mlpmem_ds.benchmarks.fuzz import bounded, compression, documents, fuzz_readers, trials
from mlpmem_ds.benchmarks.fuzz.mutations import MUTATIONS, mutate
from mlpmem_ds.benchmarks.fuzz.target import Content, Sample, Target
from mlpmem_ds.core.errors import UserError

JSON = documents.TARGETS["json"]


def outcome_of(read: Callable[[Sample], Content], count: int = 60) -> list[trials.Outcome]:
    target = replace(JSON, read=read)
    return [trials.try_input(target, seed, [JSON]) for seed in range(count)]


def failures(outcomes: list[trials.Outcome]) -> list[str]:
    return [outcome.detail for outcome in outcomes if outcome.is_failure]


def test_the_readers_pass_some_inputs_of_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fuzz.json"
    count = 6 * len(trials.TARGETS)
    words = ["--seed", "11", "--count", str(count), "--output", str(output)]
    assert fuzz_readers.main(words, prog="fuzz_readers.py") == 0, capsys.readouterr().out
    written = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert "seed 11" in written and "0 failures" in written
    assert set(found["counts"]) == set(trials.TARGETS) and found["failures"] == []
    assert sum(sum(counts.values()) for counts in found["counts"].values()) == count


def test_an_unknown_reader_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_readers.main(["--reader", "odt", "--count", "1"], prog="fuzz_readers.py") == 2
    assert "--reader odt is none of text, json" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max-seconds", "--max-bytes"])
def test_limits_that_the_system_cannot_set_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_readers.main([flag, "1e300", "--reader", "tar", "--count", "1"], prog="fuzz_readers.py") == 2
    assert f"{flag} must be above 0 and at most" in capsys.readouterr().err


def test_a_document_that_is_lost_of_whole_files_is_found() -> None:
    def lose_the_last(sample: Sample) -> Content:
        content = documents.read_corpus(sample)
        return replace(content, values=content.values[:-1])

    details = failures(outcome_of(lose_the_last, count=3))
    assert len(details) == 3 and all("a whole file is read as another" in text for text in details)


def test_a_document_that_is_lost_of_damaged_files_is_found() -> None:
    """A reader that stops at damage, as many do, and says nothing."""

    def stop_at_damage(sample: Sample) -> Content:
        try:
            return documents.read_corpus(sample)
        except UserError:
            return Content(values=[])

    details = failures(outcome_of(stop_at_damage))
    assert len(details) > 20 and all("read as" in text for text in details)


def test_a_foreign_error_and_a_message_without_the_file_are_found() -> None:
    def fail_on_damage(error: Exception) -> Callable[[Sample], Content]:
        def read(sample: Sample) -> Content:
            try:
                return documents.read_corpus(sample)
            except UserError:
                raise error from None

        return read

    assert any("KeyError: 'text'" in text for text in failures(outcome_of(fail_on_damage(KeyError("text")))))
    unnamed = failures(outcome_of(fail_on_damage(UserError("it is damaged"))))
    assert unnamed and all("names no file" in text for text in unnamed)


def test_an_input_can_be_repeated_by_its_seed(tmp_path: Path) -> None:
    def fail(sample: Sample) -> Content:
        raise KeyError

    first, again = (trials.try_input(replace(JSON, read=fail), 5, [JSON], tmp_path) for _ in range(2))
    assert first == again and first.is_failure
    assert list((tmp_path / "json-5" / "in").iterdir())


def test_a_hang_a_crash_and_hunger_for_memory_end_with_their_input() -> None:
    def call(number: int) -> int:
        if number == 1:
            time.sleep(60)
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 3:
            try:
                bytearray(1 << 33)
            except MemoryError:
                return -3
        return number

    results = list(bounded.call_bounded(call, 6, seconds=1.0, num_bytes=1 << 30))
    assert results[0] == 0 and results[3:] == [-3, 4, 5]
    assert "no answer within 1 s" in str(results[1]) and "SIGKILL" in str(results[2])


@pytest.mark.parametrize("suffix", compression.COMPRESSIONS)
def test_what_is_compressed_in_any_way_is_whole_and_a_cut_is_seen(suffix: str) -> None:
    for seed in range(20):
        random = Random(seed)
        content = random.randbytes(random.choice((0, 1, 5000)))
        packed = compression.compressed(random, content, suffix)
        assert compression.decompressed(packed) == content
        with pytest.raises(trials.Damaged):
            compression.COMPRESSIONS[suffix].decompress(packed.rstrip(b"\0")[:-1])


def test_every_mutation_changes_the_bytes_and_each_occurs() -> None:
    random = Random(0)
    names = set()
    for _ in range(400):
        name, changed = mutate(random, b'{"text": "a",\n"b": [1, 2]}', b"other bytes")
        assert changed != b'{"text": "a",\n"b": [1, 2]}'
        names.add(name)
    assert names == set(MUTATIONS)


def test_each_target_has_its_own_name() -> None:
    assert all(isinstance(target, Target) and name == target.name for name, target in trials.TARGETS.items())

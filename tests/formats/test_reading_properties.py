"""Properties of all readers of documents: any valid container of the same texts gives them, and any damage
gives an error, or what the bytes hold, or an omission by name.

The containers are those of the fuzz run (`tools/fuzz_readers.py`), which tries some thousands of inputs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmem_ds.benchmarks.fuzz import documents, tables, tars, trials, zips
from mlpmem_ds.benchmarks.fuzz.target import Store

QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(
        lambda text: bool(text.lstrip("\ufeff").strip())
    ),
    min_size=1,
    max_size=6,
)
CONTAINERS: dict[str, Store] = {
    "json": documents.store_json,
    "tar": tars.store_tar,
    "zip": zips.store_zip,
    "parquet": tables.store_parquet,
    "arrow": tables.store_arrow,
    "dataset": tables.store_dataset,
}


ARCHIVES = ("tar", "zip")  # their members may be text files, whose line ends and marks are no text


@pytest.mark.parametrize("name", CONTAINERS)
def test_any_container_of_the_same_texts_gives_them(name: str) -> None:
    @QUICK
    @given(texts=TEXTS, seed=st.integers(0, 1 << 32))
    def check(texts: list[str], seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            sample = CONTAINERS[name](Random(seed), Path(folder), texts)
            content = documents.read_corpus(sample)
            assert content == sample.content and len(content.values) == len(texts)
            if name not in ARCHIVES:
                assert list(content.values) == [text.lstrip("\ufeff") for text in texts]

    check()


@QUICK
@given(texts=TEXTS, seed=st.integers(0, 1 << 32))
def test_text_files_of_any_encoding_and_depth_give_their_texts(texts: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sample = documents.store_texts(Random(seed), Path(folder), texts)
        assert documents.read_corpus(sample) == sample.content


@pytest.mark.parametrize("name", [*CONTAINERS, "text"])
def test_any_damage_is_refused_or_named_or_as_the_bytes_say(name: str) -> None:
    @QUICK
    @given(seed=st.integers(0, 1 << 32))
    def check(seed: int) -> None:
        others = [trials.TARGETS[other] for other in CONTAINERS]
        outcome = trials.try_input(trials.TARGETS[name], seed, others)
        assert not outcome.is_failure, outcome

    check()

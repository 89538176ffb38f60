"""The same texts in any container, compression and nesting are the same tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmem_ds.benchmarks.fuzz import documents, tables, tars, zips
from mlpmem_ds.benchmarks.fuzz.target import Store
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.stages.corpus import prepare_corpus
from mlpmem_ds.stages.corpus.config import Config

STORES: list[Store] = [
    documents.store_json,
    tars.store_tar,
    zips.store_zip,
    tables.store_parquet,
    tables.store_arrow,
    tables.store_dataset,
]
TEXTS = st.lists(  # such as text files can hold, too
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\0\ufeff"), min_size=1).filter(
        lambda text: not text.isspace()
    ),
    min_size=2,
    max_size=5,
    unique=True,
)


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(texts=TEXTS, seed=st.integers(0, 1 << 32))
def test_the_container_does_not_change_a_token(texts: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        corpora = []
        for number, store in enumerate(STORES):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            sample = store(Random(seed + number), folder, texts)
            output = Path(scratch) / f"corpus{number}"
            config = Config(
                input=tuple(map(str, sample.inputs)),
                tokenizer="train:300",
                output=output,
                block_size=8,
                stride=8,
                processes=1,
            )
            prepare_corpus.run(config, World())
            corpus = open_corpus(output)
            sizes = [(document["bytes"], document["tokens"]) for document in corpus.documents]
            corpora.append((corpus.tokens(0, corpus.num_tokens).tolist(), sizes, corpus.vocabulary_sha256))
        assert all(corpus == corpora[0] for corpus in corpora[1:])

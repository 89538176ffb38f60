"""Part of `answer_questions`: the corpus cut into passages, indexed by their words, put before a question."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.engines.passage_index import PassageIndex, build_passage_index, open_passage_index
from mlpmem_ds.engines.tokenizer import TextEncoder
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.formats.corpus import CorpusSplit

FOLDER = "passages"
_TEXTS = "passages.jsonl"


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Texts and their index."""

    texts: Sequence[str] = field(repr=False)
    index: PassageIndex
    num_bytes: int
    """of both on disk"""

    def prompt(self, prompt: str, *, query: str, count: int, max_tokens: int, encoder: TextEncoder) -> str:
        """The prompt behind the passages that are nearest to the query, the best last, next to the question:
        as many of `count` as leave the whole at most `max_tokens` tokens."""
        found = [self.texts[number] for number in self.index.search(query, count)]
        while found:
            text = "\n\n".join([*reversed(found), prompt])
            if len(encoder.encode_prompts([text])[0]) <= max_tokens:
                return text
            found.pop()
        return prompt


def cut_passages(corpus: CorpusSplit, num_tokens: int) -> list[str]:
    """Each document's text in pieces of at most `num_tokens` tokens, without blanks at their ends.

    Raises:
        UserError: there is no text.
    """
    tokenizer: Any = load_tokenizer(str(corpus.tokenizer_path), flag="--passages")
    begin, texts, start = len(corpus.begin_of_document_ids), [], 0
    for document in corpus.documents:
        stop = start + document["tokens"]
        ids = corpus.tokens(start, stop)[begin:-1].tolist()  # without the end token
        for first in range(0, len(ids), num_tokens):
            text = tokenizer.decode(
                ids[first : first + num_tokens], clean_up_tokenization_spaces=False
            ).strip()
            if text:
                texts.append(text)
        start = stop
    if not texts:
        raise UserError(f"--passages {corpus.root}: its train split holds no text")
    return texts


def write_passages(writer: UnitWriter, corpus: CorpusSplit, num_tokens: int) -> dict[str, Any]:
    """Cut, index and write `passages/`; the unit's summary."""
    texts = cut_passages(corpus, num_tokens)
    with writer.file(f"{FOLDER}/{_TEXTS}") as path:
        path.write_text(
            "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
        )
    with tempfile.TemporaryDirectory() as scratch:
        for name in build_passage_index(texts).save(Path(scratch)):
            with writer.file(f"{FOLDER}/{name}") as path:
                shutil.copyfile(Path(scratch) / name, path)
    return {"passages": len(texts)}


def open_passages(output: Path) -> Passages:
    """What `write_passages` wrote below OUTPUT."""
    root = output / FOLDER
    lines = (root / _TEXTS).read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line) for line in lines if line]
    return Passages(
        texts=texts,
        index=open_passage_index(root, len(texts)),
        num_bytes=sum(path.stat().st_size for path in root.iterdir() if not path.name.startswith(".")),
    )

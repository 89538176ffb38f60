"""Of the first stage: documents → token ids, in this process or in several, in order and with bounded memory."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np

from mlpmem_ds.core.world import World
from mlpmem_ds.formats.documents import Document

BATCH_BYTES = 1 << 19
"""text of a batch: large enough that its way to another process costs nothing beside tokenizing it"""
_BATCHES_AHEAD = 3  # a process, so that none waits while the results of one before it are written
_WORTH_BYTES = 8 << 20  # of text: below, starting processes takes longer than they save
_inherited: list[Any] = []  # the tokenizer, in a worker process


def vocab_size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: Any, texts: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
    """Each text's ids and the end-of-document id after them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        lists = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    else:
        lists = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    return [np.array([*ids, tokenizer.eos_token_id], dtype=dtype) for ids in lists]


def choose_processes(asked: int, world: World, num_bytes: int) -> int:
    """How many processes tokenize: as asked; 0 is the cores of this machine where one rank has them, else one a rank."""
    if asked:
        return asked
    if world.size > 1 or num_bytes < _WORTH_BYTES or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TokenizerPool:
    """Tokenizes documents with a number of processes; one is this process itself. Close it, or use it in a `with`."""

    def __init__(self, tokenizer: Any, dtype: np.dtype[Any], processes: int) -> None:
        self._tokenizer, self._dtype, self._processes = tokenizer, dtype, processes
        self._executor: ProcessPoolExecutor | None = None
        if processes > 1:
            # Forked, so that a tokenizer of any kind is there without being pickled, and nothing is imported again.
            _inherited[:] = [tokenizer]
            context = multiprocessing.get_context("fork")
            self._executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_use_one_thread)

    def __enter__(self) -> TokenizerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def tokenize(self, documents: Iterable[tuple[Document, int]]) -> Iterator[tuple[Document, int, np.ndarray]]:
        """Each document and what came with it, with its ids, in their order."""
        if self._executor is None:
            for batch in _batches(documents):
                arrays = encode(self._tokenizer, [document.text for document, _ in batch], self._dtype)
                yield from _join(batch, arrays)
            return
        waiting: deque[tuple[list[tuple[Document, int]], Future[list[np.ndarray]]]] = deque()
        for batch in _batches(documents):
            texts = [document.text for document, _ in batch]
            waiting.append((batch, self._executor.submit(_encode_inherited, texts, self._dtype)))
            if len(waiting) >= _BATCHES_AHEAD * self._processes:
                done, future = waiting.popleft()
                yield from _join(done, future.result())
        while waiting:
            done, future = waiting.popleft()
            yield from _join(done, future.result())


def _join(
    batch: Sequence[tuple[Document, int]], arrays: Sequence[np.ndarray]
) -> Iterator[tuple[Document, int, np.ndarray]]:
    for (document, split), ids in zip(batch, arrays, strict=True):
        yield document, split, ids


def _batches(documents: Iterable[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    batch: list[tuple[Document, int]] = []
    size = 0
    for document, split in documents:
        batch.append((document, split))
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _use_one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already


def _encode_inherited(texts: list[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
    return encode(_inherited[0], texts, dtype)

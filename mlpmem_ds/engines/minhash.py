"""Texts → MinHash signatures, by the package `datasketch`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mlpmem_ds.core.errors import package_for

# A word; of scripts that are written without spaces (Chinese, Japanese, Thai) each character is one.
_NO_SPACES = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_AT_ONCE = 1 << 16  # n-grams, so that a book takes no more memory than a page


@dataclass(frozen=True, kw_only=True)
class SignatureRules:
    """What decides a signature: `words` of an n-gram, `hashes` of a signature, `seed` of these hashes."""

    words: int
    hashes: int
    seed: int


def require_minhash(flag: str) -> None:
    """Raises UserError where `datasketch` is missing."""
    remedy = "pip install 'datasketch>=2' scipy"
    with package_for(flag, "datasketch", remedy):
        import datasketch  # noqa: F401


@functools.lru_cache
def signer(rules: SignatureRules) -> Callable[[str], bytes]:
    """A function from a text to its signature, `rules.hashes` bytes: the low 8 bits of each minimum hash.

    Two texts with the same words, in small letters and without what stands between them, have the same one.
    """
    from datasketch import MinHash

    seed = rules.seed % (1 << 32)  # NumPy's RandomState, which draws the hashes, knows no larger one
    empty = MinHash(num_perm=rules.hashes, seed=seed, scheme="affine32")

    def sign(text: str) -> bytes:
        signature = empty.copy()
        for grams in _grams(text, rules.words):
            signature.update_batch(grams)
        low: np.ndarray = (signature.hashvalues & 0xFF).astype(np.uint8)
        return low.tobytes()

    return sign


def _grams(text: str, size: int) -> Iterator[list[bytes]]:
    """The n-grams of a text's words, some at a time; a shorter text is one n-gram, one without words is its
    own."""
    words = _WORDS.findall(text.lower())
    if not words:
        yield [text.encode()]
    for start in range(0, max(len(words) - size + 1, min(len(words), 1)), _AT_ONCE):
        stop = min(start + _AT_ONCE, max(len(words) - size + 1, 1))
        yield [" ".join(words[at : at + size]).encode() for at in range(start, stop)]

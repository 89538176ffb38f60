"""Part of `answer_questions`: how right an answer in words is; the rules are those of SQuAD and NQ-open."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_STOPS = re.compile(r"[\n.,]")


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, with single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def short_answer(text: str) -> str:
    """A continuation up to its first line end, full stop or comma, where NQ-open's task ends an answer."""
    return _STOPS.split(text.strip(), maxsplit=1)[0].strip()


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where the text is one of the answers, both normalized; else 0."""
    return float(normalized(text) in map(normalized, answers))


def contains(text: str, answers: Sequence[str]) -> float:
    """1 where the words of an answer stand in the text in a row, both normalized; else 0."""
    words = f" {normalized(text)} "
    return float(any(f" {normalized(answer)} " in words for answer in answers if normalized(answer)))


def f1(text: str, answers: Sequence[str]) -> float:
    """The best harmonic mean, over the answers, of the shares of common words in text and answer."""
    return max(_f1_of(normalized(text).split(), normalized(answer).split()) for answer in answers)


def _f1_of(words: Sequence[str], answer: Sequence[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    common = (Counter(words) & Counter(answer)).total()
    return 2 * common / (len(words) + len(answer))

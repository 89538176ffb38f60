"""Texts made of what readers stumble over: separators of lines, marks, halves of escapes, special tokens."""

from __future__ import annotations

from random import Random

NASTY = (
    "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x00", "\x1a", "\x7f", "\t",
    "\r", "\r\n", "\n\n", "\ufeff", "\ufffe", "\ufffd", "\u0301", "\u200d", "\u202e", "\u00ad", "\u0130",
    "😀", "👩‍👩‍👧‍👦", "𝔘𝔫𝔦", "漢字", "العربية", "n\u0303ame", "ﬁ", "\U0010ffff", "\ue000",
    "<|endoftext|>", "</s>", "<s>", "<unk>", "<pad>", "[CLS]", "<|im_start|>user", "<bos>", "<0x0A>", "▁",
    "Ġ",
    '{"text": "a"}', '"', "\\", "\\u0041", "\\ud800", "\\n", "[1, 2", "NaN", "null", "1e999", "9" * 60, "- -",
    "PAR1", "ARROW1", "ustar", "(\xb5/\xfd", "\x1f\x8b", "BZh9", "%PDF", "#!/bin/sh", "\x7fELF", "PK\x03\x04",
)  # fmt: skip
_WORDS = (
    "a",
    "page",
    "about",
    "the",
    "lake",
    "and",
    "its",
    "fish",
    "Zürich",
    "naïve",
    "0.5",
    "x=1;",
    "--flag",
)
_LONG = 20_000  # characters of a long line


def made_up_text(random: Random) -> str:
    """One text that is not blank; up to some dozens of pieces, now and then one very long line."""
    pieces = [
        random.choice(NASTY) if random.random() < 0.4 else random.choice(_WORDS)
        for _ in range(random.choice((1, 2, 5, 12, 40)))
    ]
    if random.random() < 0.03:
        pieces.insert(random.randrange(len(pieces) + 1), random.choice(_WORDS) * _LONG)
    text = random.choice(("", " ", "\n")).join(pieces)
    return text if text and not text.isspace() else f"{text}x"


def made_up_texts(random: Random, *, max_texts: int = 9) -> list[str]:
    """Some different texts, at least one."""
    return list(dict.fromkeys(made_up_text(random) for _ in range(random.randint(1, max_texts))))

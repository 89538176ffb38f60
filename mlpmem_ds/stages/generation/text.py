"""Part of `generate`: token ids → the text that is shown, piece by piece or whole, in one column or two."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

from transformers.generation.streamers import BaseStreamer

_COLUMN_WIDTH = 58
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """The text of tokens that follow others, as they come.

    A token's text depends on its neighbours: a character may be spread over several, and the first of a text
    loses the space before it in many vocabularies. So the new text is what decoding adds to the text of the
    tokens before, and an unfinished character waits for its rest. Control tokens are shown as they are
    spelled: nothing is left out.
    """

    def __init__(self, tokenizer: Any, before: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._start, self._shown = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token finishes; empty if a character is unfinished."""
        self._ids.append(token)
        return self._new_text(whole=False)

    def finish(self) -> str:
        """What is left at the end."""
        return self._new_text(whole=True)

    def _new_text(self, *, whole: bool) -> str:
        prefix, text = (
            self._decode(self._ids[self._start : self._shown]),
            self._decode(self._ids[self._start :]),
        )
        is_within = not text.startswith(prefix)  # the tokens before end within a character
        if is_within:
            prefix = prefix.rstrip(_UNFINISHED)
        if len(text) <= len(prefix) or (text.endswith(_UNFINISHED) and not whole):
            return ""
        # The next text is what is added to that of whole characters.
        self._start, self._shown = self._start if is_within else self._shown, len(self._ids)
        return text[len(prefix) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_after(tokenizer: Any, before: Iterable[int], ids: Iterable[int]) -> str:
    """The text of `ids` where they follow `before`."""
    text = GrowingText(tokenizer, before)
    return "".join([*map(text.add, ids), text.finish()])


class Writer(BaseStreamer):
    """Gives the text of one continuation to a function while it is generated, up to its end token."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], ends: Sequence[int], write: Callable[[str], object]
    ) -> None:
        self._text, self._write = GrowingText(tokenizer, prompt), write
        self._ends, self._is_prompt, self._is_over = ends, True, False

    def put(self, value: Any) -> None:
        """As transformers calls it: first with the prompt [1, S], then with each token [1]."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._is_over = self._is_over or token in self._ends
            if not self._is_over and (piece := self._text.add(token)):
                self._write(piece)

    def end(self) -> None:
        """As transformers calls it, once."""
        if piece := self._text.finish():
            self._write(piece)


def side_by_side(headers: tuple[str, str], texts: Sequence[str]) -> str:
    """Two texts in two columns; their own line ends are kept, long lines are wrapped."""
    columns = [
        [header, "-" * _COLUMN_WIDTH, *_wrap(text)] for header, text in zip(headers, texts, strict=True)
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left.ljust(_COLUMN_WIDTH)}  {right}".rstrip() for left, right in rows)


def _wrap(text: str) -> list[str]:
    lines = text.expandtabs(4).split("\n")
    return [
        piece
        for line in lines
        for piece in textwrap.wrap(line, _COLUMN_WIDTH, replace_whitespace=False, drop_whitespace=False)
        or [""]
    ]

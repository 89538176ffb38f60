"""A name as text: valid UTF-8, and read back as the same name."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.core.names import printable, spell_name, spell_path

_SPELLED = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})")


def read_name(spelled: str) -> str:
    """The name that `spell_name` has spelled."""

    def character(match: re.Match[str]) -> str:
        if match[2]:
            return chr(int(match[2], 16))
        code = int(match[1], 16)
        return chr(code if code < 0x80 else 0xDC00 + code)

    return _SPELLED.sub(character, spelled)


@given(st.binary(max_size=40))
def test_every_name_of_bytes_is_spelled_in_utf8_and_read_back(name: bytes) -> None:
    decoded = os.fsdecode(name)
    spelled = spell_name(decoded)
    spelled.encode("utf-8")
    assert os.fsencode(read_name(spelled)) == name


@given(
    st.text(st.characters(blacklist_categories=[]) | st.sampled_from("\\xu05cde\ud83d\udce9"), max_size=12)
)
def test_every_text_is_spelled_in_utf8_and_read_back(name: str) -> None:
    spelled = spell_name(name)
    spelled.encode("utf-8")
    assert read_name(spelled) == name


def test_a_name_that_can_be_written_stays_as_it_is() -> None:
    assert spell_name("caf\udce9.txt") == r"caf\xe9.txt"
    assert spell_name(r"caf\xe9.txt") == r"caf\x5cxe9.txt"
    for name in ("a/b c.txt", "ä\u2028\n'", r"C:\temp\x.txt", "😀"):
        assert spell_name(name) == name


def test_a_path_is_read_as_utf8_in_every_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spell_path("ä b.txt") == "ä b.txt" and spell_path(r"caf\xe9") == r"caf\x5cxe9"
    assert spell_path(os.fsdecode(b"caf\xe9.txt")) == r"caf\xe9.txt"
    for locale in ("ascii", "latin-1"):

        def fsencode(path: str, locale: str = locale) -> bytes:
            return path.encode(locale, "surrogateescape")

        monkeypatch.setattr(os, "fsencode", fsencode)
        for name, spelled in (("ä 文.txt".encode(), "ä 文.txt"), (b"caf\xe9.txt", r"caf\xe9.txt")):
            assert spell_path(name.decode(locale, "surrogateescape")) == spelled


def test_what_would_break_a_line_of_a_message_is_escaped() -> None:
    assert printable("a\nb\x1b[2J\u2028 é") == r"a\nb\x1b[2J\u2028 é"

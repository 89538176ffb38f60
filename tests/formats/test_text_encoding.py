import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.formats.records import ReadRules
from mlpmem_ds.formats.text_encoding import NotTextError, has_ascii, known_encoding

TEXT = "Ein Text: äöü, “quotes”, 文字, a smile 😀\nand a second line\n"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF8 * 2, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("named", ["utf-8", "latin-1", "shift_jis"])
def test_a_mark_says_the_encoding_and_is_no_text(mark: bytes, encoding: str, named: str) -> None:
    assert ReadRules(encoding=named).decode(mark + TEXT.encode(encoding)) == TEXT
    assert ReadRules(encoding=named).decode(mark) == ""


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\ufeff\r")))
def test_every_text_is_the_same_in_every_unicode_encoding(text: str) -> None:
    marks = [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_BE, "utf-16-be")]
    for mark, encoding in [*marks, (codecs.BOM_UTF32_LE, "utf-32-le")]:
        assert ReadRules().decode(mark + text.encode(encoding)) == text
    for encoding in ("utf-16-le", "utf-32-be"):
        line = f"{text}\n"
        assert ReadRules(encoding=encoding).decode(line.encode(encoding)) == line
        assert ReadRules(encoding=encoding).decode(line.encode()) == line


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin-1", "café"),
        ("cp1252", "“café” – €"),
        ("shift_jis", "日本語のテキスト"),
        ("gb18030", "中文文本"),
        ("koi8-r", "русский текст"),
        ("iso-2022-jp", "日本語"),
        ("utf-16-le", "plain text"),
        ("utf-32-be", "plain text"),
        ("cp037", "EBCDIC text"),
    ],
)
def test_a_named_encoding_reads_what_is_not_utf8(encoding: str, text: str) -> None:
    rules = ReadRules(encoding=known_encoding(encoding))
    assert rules.decode(text.encode(encoding)) == text
    if has_ascii(encoding):  # files of both kinds in one folder
        assert rules.decode("schön, 文字".encode()) == "schön, 文字"


def test_what_is_no_text_is_refused_with_the_reason() -> None:
    for content, reason in (
        (b"caf\xe9", "not UTF-8.*byte 3"),
        (b"\xff\xfea", "not utf-16"),
        ("text without a mark".encode("utf-16-le"), "NUL.*--encoding utf-16-le"),
        (bytes(range(20)) * 9 + bytes(30), "NUL"),
    ):
        with pytest.raises(NotTextError, match=reason):
            ReadRules().decode(content)
    with pytest.raises(NotTextError, match="euc_jp"):
        ReadRules(encoding="euc_jp").decode(b"\xff\xff")
    with pytest.raises(NotTextError, match="surrogates"):
        ReadRules(encoding="unicode_escape").decode(rb"\ud800 \xe9" + b"\xe9")
    assert ReadRules().decode(b"a stray NUL\0 in a text") == "a stray NUL\0 in a text"


def test_encodings_that_python_does_not_know_are_refused() -> None:
    for name in ("", "nonsense", "rot13", "base64", "a\0b"):
        with pytest.raises(LookupError):
            known_encoding(name)
    assert known_encoding("UTF8") == known_encoding("utf-8") == "utf-8"
    assert known_encoding("Latin1") == known_encoding("iso-8859-1")

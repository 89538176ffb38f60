"""Samples of text files and of JSON lines, and what such files hold, read whole."""

from __future__ import annotations

import codecs
import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from mlpmem_ds.benchmarks.fuzz.compression import COMPRESSIONS, compressed, decompressed
from mlpmem_ds.benchmarks.fuzz.target import Content, Damaged, Sample, Store, Target
from mlpmem_ds.benchmarks.fuzz.texts import made_up_text, made_up_texts
from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.input_files import FILE_PATTERNS, find_files
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules

MARKS = (  # the longer ones first: that of UTF-32 starts like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WITH_ASCII = ("utf-8", "latin-1", "cp1252", "cp1251", "shift_jis", "euc_jp", "gb18030", "big5")
_WIDE = ("utf-16-le", "utf-32-be")
_ENCODINGS = ("utf-8",) * 4 + _WITH_ASCII + _WIDE + ("utf-7", "iso2022_jp")
_NAMES = ("\udcff", "a", "b c", "ü", "x.y", "n" * 100, "-dash", "日本", "1", "'q'", "$(x)", "%41", "a\u2028b")
_ENDINGS = (".txt", ".md", ".py", ".TXT")
_DEEP = 50
_MAX_NULS = 10  # of a text file, one character in so many


def read_corpus(sample: Sample) -> Content:
    """The texts of documents as `prepare_corpus` finds and reads them."""
    found = find_files([str(path) for path in sample.inputs], None, ())
    rules = ReadRules(encoding=sample.settings.get("encoding", "utf-8"))
    items = [item for file in found.files for item in read_documents(file, rules)]
    omissions = [*found.omissions, *(item for item in items if isinstance(item, Omission))]
    return Content(
        values=[item.text for item in items if isinstance(item, Document)],
        num_left_out=sum(omission.count for omission in omissions if omission.loses_text),
        num_empty=sum(omission.count for omission in omissions if omission.reason == "empty"),
    )


def content_of(texts: Iterable[str | None], *, num_left_out: int = 0, num_empty: int = 0) -> Content:
    """The texts without byte-order marks that are not blank; the others are counted with `num_empty`."""
    listed = [(text or "").lstrip("\ufeff") for text in texts]
    values = [text for text in listed if text and not text.isspace()]
    num_blank = len(listed) - len(values)
    return Content(values=values, num_left_out=num_left_out, num_empty=num_empty + num_blank)


def with_plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decoded(content: bytes, encoding: str = "utf-8") -> str:
    """Text with a byte-order mark, which is no part of it, or without one in UTF-8 or in `encoding`."""
    mark, marked = next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", ""))
    is_wide = encoding in _WIDE and b"\0" not in content
    names = ["utf-8", encoding] if encoding in _WITH_ASCII or is_wide else [encoding]
    for name in [marked] if marked else names:
        try:
            text = content[len(mark) :].decode(name)
            text.encode()
            return text
        except UnicodeError as error:
            fault = error
    raise Damaged(str(fault)) from fault


def text_of_file(content: bytes, encoding: str = "utf-8") -> str:
    """The text of a whole file, which has few characters NUL."""
    text = decoded(content, encoding).lstrip("\ufeff")
    if text.count("\0") * _MAX_NULS > len(text):
        raise Damaged("mostly NUL")
    return with_plain_line_ends(text)


def as_file_text(text: str) -> str:
    """A text that a text file can hold: not blank, with few NUL, without a mark at its start."""
    text = text.lstrip("\ufeff")
    if text.count("\0") * _MAX_NULS > len(text):
        text = text.replace("\0", "") + "x"
    if text.lstrip().startswith(("{", "[", "PAR1", "ARROW1")):  # like another kind of file
        text = "x" + text
    return text if text and not text.isspace() else "x"


def encoded(random: Random, text: str, encoding: str = "utf-8") -> bytes:
    """The text in an encoding that its mark tells, or in `encoding` without one, where that can be read."""
    mark, marked = random.choice(MARKS)
    if marked == "utf-16-le" and text.startswith("\0"):  # the mark and NUL are the mark of UTF-32
        mark, marked = MARKS[2]
    if random.random() < 0.5:
        try:
            content = text.encode(encoding)
            is_plain = decompressed(content) is content
            if is_plain and decoded(content, encoding) == text:
                return content
        except (UnicodeError, Damaged):
            pass
    return mark + text.encode(marked)


def written(store: Store) -> Callable[[Random, Path], Sample]:
    """Writes made-up texts."""
    return lambda random, folder: store(random, folder, made_up_texts(random))


def store_texts(random: Random, folder: Path, texts: Sequence[str]) -> Sample:
    """Text files at random depths. Texts that a file cannot hold as they are, are changed."""
    root = folder / "texts"
    files: dict[str, str] = {}
    encoding = random.choice(_ENCODINGS)
    for number, given in enumerate(texts):
        text, packing = as_file_text(given), random.choice(("", "", "", "", *COMPRESSIONS))
        above = [random.choice(_NAMES) for _ in range(random.choice((0, 0, 1, 3)))]
        name = "/".join([*above, f"{random.choice(_NAMES)}{number}{random.choice(_ENDINGS)}{packing}"])
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(compressed(random, encoded(random, text, encoding), packing))
        files[name] = with_plain_line_ends(text)
    order = sorted(files, key=lambda name: name.split("/"))
    return Sample(
        inputs=(root,),
        files=tuple(root / name for name in order),
        content=Content(values=[files[name] for name in order]),
        settings={"encoding": encoding},
    )


def expect_texts(sample: Sample) -> Content:
    """A file that is not text is left out of a directory, by name."""
    texts, num_left_out = [], 0
    for path in sample.files:
        try:
            texts.append(text_of_file(decompressed(path.read_bytes()), sample.settings["encoding"]))
        except Damaged:
            num_left_out += 1
    return content_of(texts, num_left_out=num_left_out)


def made_up_fields(random: Random) -> dict[str, Any]:
    """Other fields of a record, with values that JSON's readers stumble over."""
    deep: Any = "deep"
    for _ in range(_DEEP):
        deep = [deep]
    values: Sequence[Any] = (
        None, True, -0.0, 1e308, 10**30, 9**5000 if random.random() < 0.1 else 3, [], {}, {"text": "inner"},
        deep, "", float("nan"), float("-inf"), made_up_text(random),
    )  # fmt: skip
    names = ("id", "meta", "Text", "text ", "", "url", "texts", "author\u2028")
    return {random.choice(names): random.choice(values) for _ in range(random.choice((0, 0, 1, 3)))}


def json_line(random: Random, text: str | None) -> str:
    """A record in one line."""
    items = [*made_up_fields(random).items(), ("text", text)]
    random.shuffle(items)
    separators = random.choice(((", ", ": "), (",", ":"), (" ,\t", " : ")))
    return _dumped(dict(items), ensure_ascii=random.random() < 0.5, separators=separators)


def _dumped(value: Any, **settings: Any) -> str:
    """JSON, also of an integer with more digits than Python turns to text."""
    marker = "9" * 5000
    huge = {key: item for key, item in value.items() if isinstance(item, int) and item > 10**4000}
    plain = {key: "\0huge" if key in huge else item for key, item in value.items()}
    return json.dumps(plain, **settings).replace('"\\u0000huge"', marker)


def json_of(random: Random, texts: Sequence[str]) -> tuple[bytes, Content]:
    """JSON lines with blank lines, records without text, and line ends of either kind; or one array."""
    end = random.choice(("\n", "\n", "\r\n"))
    lines = [json_line(random, text) for text in texts]
    num_empty = random.choice((0, 0, 0, 1, 2))
    for _ in range(num_empty):
        text = random.choice((None, "", " \n", "\u2028"))
        lines.insert(random.randrange(len(lines) + 1), json_line(random, text))
    if random.random() < 0.15:
        whole = f"[{end}{f',{end}'.join(lines)}{end}]{end}"
    else:
        for _ in range(random.choice((0, 0, 1, 3))):
            lines.insert(random.randrange(len(lines) + 1), random.choice(("", "  ", "\t")))
        whole = end.join(lines) + random.choice((end, end, "", end + end))
    return encoded(random, whole), content_of(texts, num_empty=num_empty)


def texts_of_json(content: bytes, field: str = "text") -> list[str | None]:
    """The texts of JSON lines, or of a file that is one array or one object."""
    text = decoded(content)
    lines = [line.removeprefix("\ufeff") for line in text.split("\n")]
    lines = [line for line in lines if line.strip()]
    try:
        values = [parsed_json(line) for line in lines]
    except Damaged:
        values = [parsed_json(text)]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    return [text_of_record(value, field) for value in values]


def parsed_json(text: str) -> Any:
    try:
        return json.loads(text, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise Damaged(str(error)[:200]) from error


def text_of_record(value: Any, field: str = "text") -> str | None:
    """A field of an object: a text, a list of texts, or null."""
    if not isinstance(value, dict) or field not in value:
        raise Damaged("no object with a text")
    parts = value[field] if isinstance(value[field], list) else [value[field]]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise Damaged("a text that is none")
    try:
        text = "\n".join(part for part in parts if part is not None)
        text.encode()
    except UnicodeEncodeError as error:
        raise Damaged(str(error)) from error
    return text


def in_one_file(
    kinds: Sequence[str],
    contain: Callable[[Random, Sequence[str]], tuple[bytes, Content]],
    suffixes: Sequence[str] = ("", *COMPRESSIONS),
) -> Store:
    """Stores texts in one file, compressed as its suffix says; its folder is given where that counts.

    Args:
        kinds: suffixes without the compression's.
        suffixes: of compressions; "" is none.
        contain: the file's bytes, and what they hold.
    """

    def store(random: Random, folder: Path, texts: Sequence[str]) -> Sample:
        suffix = random.choice(suffixes)
        name = f"{random.choice(('a', 'b.c', 'd e', 'ü', 'A'))}{random.choice(kinds)}{suffix}"
        path = folder / (name.upper() if random.random() < 0.1 else name)
        plain, content = contain(random, texts)
        path.write_bytes(compressed(random, plain, suffix))
        plain_name = name.lower().removesuffix(suffix)
        counts = any(fnmatch.fnmatch(plain_name, pattern) for pattern in FILE_PATTERNS)
        inputs = (folder if counts and random.random() < 0.5 else path,)
        return Sample(inputs=inputs, files=(path,), content=content)

    return store


def expect_json(sample: Sample) -> Content:
    return content_of(texts_of_json(decompressed(sample.files[0].read_bytes())))


store_json = in_one_file((".jsonl", ".jsonl", ".json", ".ndjson"), json_of)
TARGETS: Mapping[str, Target] = {
    "text": Target(name="text", write=written(store_texts), read=read_corpus, expect=expect_texts),
    "json": Target(
        name="json",
        write=written(store_json),
        read=read_corpus,
        expect=expect_json,
    ),
}

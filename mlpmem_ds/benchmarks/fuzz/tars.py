"""Tars in every format of tar, and what their blocks hold, read one after another."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from random import Random

from mlpmem_ds.benchmarks.fuzz.archives import Member, content_of_members, made_up_members
from mlpmem_ds.benchmarks.fuzz.compression import decompressed
from mlpmem_ds.benchmarks.fuzz.documents import in_one_file, read_corpus, written
from mlpmem_ds.benchmarks.fuzz.target import Content, Damaged, Sample, Target

_BLOCK = 512
_FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tar_of(random: Random, texts: Sequence[str]) -> tuple[bytes, Content]:
    stream = io.BytesIO()
    members, content = made_up_members(random, texts)
    is_short = max(len(member.name.encode()) for member in members) < 100
    kind = random.choice(_FORMATS if is_short else _FORMATS[1:])
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        if random.random() < 0.3:
            entry = tarfile.TarInfo("s")
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for member in members:
            entry = tarfile.TarInfo(member.name)
            entry.size, entry.mtime = len(member.content), random.choice((0, 1_700_000_000))
            archive.addfile(entry, io.BytesIO(member.content))
    return stream.getvalue(), content


def members_of(blocks: bytes) -> Iterator[Member]:
    """The files of a tar, by its blocks alone.

    Raises:
        Damaged: a header without its checksum, a file that is cut short, or no block of zeros at the end.
    """
    position, named, pax = 0, None, dict[str, str]()
    while True:
        header = blocks[position : position + _BLOCK]
        if header == bytes(_BLOCK):  # the end, or the gap between tars that were joined
            position += _BLOCK
            if position == len(blocks):
                return
            continue
        size, kind = _checked_size(header), header[156:157]
        size = int(pax.get("size", size))
        start, position = position + _BLOCK, position + _BLOCK
        if kind in b"0\0 75LxgKSV" or kind not in b"123456":
            position += -(-size // _BLOCK) * _BLOCK
        content = blocks[start : start + size]
        if len(content) < size or position > len(blocks):
            raise Damaged("a file is cut short")
        if kind == b"L":
            named = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            pax = _pax_fields(content)
        elif kind not in (b"g", b"K"):
            if kind in b"0\0":
                yield Member(pax.get("path", named or _ustar_name(header)), content)
            named, pax = None, {}


def _checked_size(header: bytes) -> int:
    """The size in a header whose checksum is right."""
    if len(header) < _BLOCK:
        raise Damaged("no end of the archive")
    try:
        total = int(header[148:156].strip(b" \0") or b"0", 8)
        size = header[124:136]
        num_bytes = (
            int.from_bytes(size[1:], "big") if size[:1] == b"\x80" else int(size.strip(b" \0") or b"0", 8)
        )
    except ValueError as error:
        raise Damaged(f"no header ({error})") from error
    if total != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise Damaged("a header without its checksum")
    return num_bytes


def _ustar_name(header: bytes) -> str:
    prefix = header[345:500].partition(b"\0")[0] if header[257:262] == b"ustar" else b""
    name = header[:100].partition(b"\0")[0]
    whole = prefix + b"/" + name if prefix and header[263:265] == b"00" else name
    return whole.decode("utf-8", "surrogateescape")


def _pax_fields(content: bytes) -> dict[str, str]:
    fields = {}
    while content.strip(b"\0"):
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(content):
            raise Damaged("a PAX header that cannot be read")
        key, equals, value = content[len(length) + 1 : int(length)].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise Damaged("a PAX header that cannot be read")
        fields[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return fields


def expect_tar(sample: Sample) -> Content:
    return content_of_members(members_of(decompressed(sample.files[0].read_bytes())))


store_tar = in_one_file((".tar",), tar_of)
TARGET = Target(name="tar", write=written(store_tar), read=read_corpus, expect=expect_tar)

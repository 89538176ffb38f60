"""Zip archives, and what their members hold, read by the headers in front of the members."""

from __future__ import annotations

import bz2
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from random import Random

from mlpmem_ds.benchmarks.fuzz.archives import Member, content_of_members, made_up_members
from mlpmem_ds.benchmarks.fuzz.documents import in_one_file, read_corpus, written
from mlpmem_ds.benchmarks.fuzz.target import Content, Damaged, Sample, Target

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_HEADER = struct.Struct("<4sHHHHHIIIHH")
_UTF8 = 1 << 11  # flag of a name


def zip_of(random: Random, texts: Sequence[str]) -> tuple[bytes, Content]:
    stream = io.BytesIO()
    members, content = made_up_members(random, texts)
    with zipfile.ZipFile(stream, "w") as archive:
        for member in members:
            archive.writestr(member.name, member.content, compress_type=random.choice(_METHODS))
        archive.comment = random.choice((b"", b"", b"a comment"))
    return stream.getvalue(), content


def members_of(content: bytes) -> Iterator[Member]:
    """The members from the start of the file up to the directory.

    Raises:
        Damaged: a header, a size or a checksum is wrong.
    """
    position = 0
    while content[position : position + 4] == b"PK\x03\x04":
        try:
            header = _HEADER.unpack_from(content, position)
        except struct.error as error:
            raise Damaged(str(error)) from error
        flags, method, checksum, packed_size, size, name_size, extra_size = (*header[2:4], *header[6:])
        start = position + _HEADER.size + name_size + extra_size
        name = content[position + _HEADER.size :][:name_size]
        plain = _unpacked(content[start : start + packed_size], method)
        if len(plain) != size or zlib.crc32(plain) != checksum:
            raise Damaged("a member without its checksum")
        yield Member(name.decode("utf-8" if flags & _UTF8 else "cp437", "replace"), plain)
        position = start + packed_size
    if content[position : position + 4] not in (b"PK\x01\x02", b"PK\x05\x06"):
        raise Damaged("no directory")


def _unpacked(packed: bytes, method: int) -> bytes:
    try:
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompress(packed, -15)
        return bz2.decompress(packed) if method == zipfile.ZIP_BZIP2 else packed
    except (zlib.error, OSError, ValueError) as error:
        raise Damaged(str(error)) from error


def expect_zip(sample: Sample) -> Content:
    return content_of_members(members_of(sample.files[0].read_bytes()))


store_zip = in_one_file((".zip",), zip_of, suffixes=("",))
TARGET = Target(name="zip", write=written(store_zip), read=read_corpus, expect=expect_zip)

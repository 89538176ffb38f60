"""gzip, zstd, bzip2 and xz: written in many of the valid ways, and read strictly, a whole file at once."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, NamedTuple

import zstandard

from mlpmem_ds.benchmarks.fuzz.target import Damaged

_MAX_WINDOW_LOG = 28  # of a frame; decoders take up to 31, and its memory
_SKIPPABLE = 0x184D2A50  # magic numbers of frames that hold no content end in any of 16 digits
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Compression(NamedTuple):
    magic: re.Pattern[bytes]
    compress: Callable[[Random, bytes], bytes]
    decompress: Callable[[bytes], bytes]
    """raises Damaged"""


def _parts(random: Random, content: bytes) -> list[bytes]:
    """The content cut into one to three parts; some may be empty."""
    stops = sorted(random.randrange(len(content) + 1) for _ in range(random.choice((0, 0, 1, 2))))
    return [content[start:stop] for start, stop in zip([0, *stops], [*stops, len(content)], strict=True)]


def _gzip_member(random: Random, content: bytes) -> bytes:
    stream = io.BytesIO()
    name = random.choice(("", "a.jsonl", "dir/ü.txt"))
    with gzip.GzipFile(
        name, "wb", random.randint(0, 9), stream, mtime=random.choice((0, 1, 1_700_000_000))
    ) as file:
        file.write(content)
    return stream.getvalue()


def compress_gzip(random: Random, content: bytes) -> bytes:
    """Members one after the other; zeros may follow, as tapes pad."""
    members = b"".join(_gzip_member(random, part) for part in _parts(random, content))
    return members + bytes(random.choice((0, 0, 0, 512)))


def decompress_gzip(content: bytes) -> bytes:
    parts = list[bytes]()
    while content or not parts:
        decoder = zlib.decompressobj(31)
        parts.append(_decoded(decoder, content, zlib.error))
        content = decoder.unused_data.lstrip(b"\0")
    return b"".join(parts)


def compress_zstd(random: Random, content: bytes) -> bytes:
    """Frames one after the other, some of which hold nothing."""
    frames = []
    for part in _parts(random, content):
        parameters = zstandard.ZstdCompressionParameters.from_level(
            random.choice((-5, 1, 3, 12)),
            write_checksum=random.random() < 0.5,
            write_content_size=random.random() < 0.5,
            window_log=random.choice((10, 17, 23, _MAX_WINDOW_LOG)),
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        frames.append(compressor.compress(part) + compressor.flush())
        if random.random() < 0.1:
            skipped = random.randbytes(random.randint(0, 9))
            magic = _SKIPPABLE + random.randrange(16)
            frames.append(magic.to_bytes(4, "little") + len(skipped).to_bytes(4, "little") + skipped)
    return b"".join(frames)


def decompress_zstd(content: bytes) -> bytes:
    parts = list[bytes]()
    while content or not parts:
        magic = int.from_bytes(content[:4], "little")
        if magic & ~0xF == _SKIPPABLE:
            stop = 8 + int.from_bytes(content[4:8], "little")
            if len(content) < stop:
                raise Damaged("cut short in a skippable frame")
            parts.append(b"")
            content = content[stop:]
            continue
        if not content.startswith(_ZSTD_MAGIC):
            raise Damaged("no frame")
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        parts.append(_decoded(decoder, content, zstandard.ZstdError))
        content = decoder.unused_data
    return b"".join(parts)


def compress_bzip2(random: Random, content: bytes) -> bytes:
    return b"".join(bz2.compress(part, random.randint(1, 9)) for part in _parts(random, content))


def decompress_bzip2(content: bytes) -> bytes:
    parts = list[bytes]()
    while content or not parts:
        decoder = bz2.BZ2Decompressor()
        parts.append(_decoded(decoder, content, OSError))
        content = decoder.unused_data
    return b"".join(parts)


def compress_xz(random: Random, content: bytes) -> bytes:
    """Streams one after the other, with padding of fours of zeros between them."""
    streams = []
    for part in _parts(random, content):
        check = random.choice((lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256))
        streams.append(lzma.compress(part, lzma.FORMAT_XZ, check, random.randint(0, 2)))
        streams.append(bytes(random.choice((0, 0, 4, 8))))
    return b"".join(streams)


def decompress_xz(content: bytes) -> bytes:
    parts = list[bytes]()
    while content or not parts:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        parts.append(_decoded(decoder, content, lzma.LZMAError))
        padded = decoder.unused_data
        content = padded.lstrip(b"\0")
        if (len(padded) - len(content)) % 4:
            raise Damaged("padding that is no multiple of four")
    return b"".join(parts)


def _decoded(decoder: Any, content: bytes, error_kind: type[Exception]) -> bytes:
    """One member, frame or stream, which must be whole."""
    try:
        plain: bytes = decoder.decompress(content)
    except (error_kind, EOFError) as error:
        raise Damaged(str(error)) from error
    if not decoder.eof:
        raise Damaged("cut short")
    return plain


COMPRESSIONS: Mapping[str, Compression] = {
    ".gz": Compression(re.compile(rb"\x1f\x8b"), compress_gzip, decompress_gzip),
    ".zst": Compression(
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), compress_zstd, decompress_zstd
    ),
    ".bz2": Compression(re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), compress_bzip2, decompress_bzip2),
    ".xz": Compression(re.compile(rb"\xfd7zXZ\x00"), compress_xz, decompress_xz),
}


def compressed(random: Random, content: bytes, suffix: str) -> bytes:
    """The content as a file of this suffix holds it; "" is no compression."""
    return COMPRESSIONS[suffix].compress(random, content) if suffix else content


def decompressed(content: bytes) -> bytes:
    """The content of a file, whose first bytes say how it is compressed.

    Raises:
        Damaged: it is not whole.
    """
    for compression in COMPRESSIONS.values():
        if compression.magic.match(content):
            return compression.decompress(content)
    return content

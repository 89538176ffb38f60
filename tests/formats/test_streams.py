"""Compressed files: members joined, cut, altered, misnamed; each is read whole or refused with its reason."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.streams import is_compressed_name, opened, read_whole

TEXT = "".join(f"line {number} ü\n" for number in random.Random(0).sample(range(10_000), 400)).encode()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda content: gzip.compress(content, mtime=0),
    "zst": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
EACH = pytest.mark.parametrize("suffix", COMPRESS)


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@EACH
@given(parts=st.lists(st.binary(max_size=3000), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_joined_members_give_all_that_was_compressed(suffix: str, parts: list[bytes], tmp_path: Path) -> None:
    # Content that begins as a compressed file does is refused: it was compressed twice.
    assume(not b"".join(parts).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")))
    joined = b"".join(map(COMPRESS[suffix], parts))
    for name in (f"x.txt.{suffix}", f"X.TXT.{suffix.upper()}", "misnamed.txt", "misnamed.gz"):
        assert read_whole(written(tmp_path, name, joined)) == b"".join(parts)


@EACH
def test_a_file_cut_at_any_byte_is_refused(suffix: str, tmp_path: Path) -> None:
    whole = COMPRESS[suffix](TEXT)
    for size in [*range(20), *range(20, len(whole), 7)]:
        path = written(tmp_path, f"x.txt.{suffix}", whole[:size])
        with pytest.raises(UserError, match=r"x.txt.*(cut short|neither compressed)"):
            read_whole(path)
    both = whole + whole
    for size in (len(whole) + 1, len(whole) + 5, len(both) - 1):
        with pytest.raises(UserError, match="cut short|follows the end"):
            read_whole(written(tmp_path, f"x.txt.{suffix}", both[:size]))


@EACH
def test_a_file_with_a_changed_byte_is_refused_or_gives_the_same(suffix: str, tmp_path: Path) -> None:
    """Some bytes of a header change nothing, such as gzip's time."""
    whole = COMPRESS[suffix](TEXT)
    chosen = random.Random(1)
    for place in [*range(20), *chosen.sample(range(20, len(whole)), 150)]:
        altered = bytearray(whole)
        altered[place] ^= 1 << chosen.randrange(8)
        path = written(tmp_path, f"x.txt.{suffix}", bytes(altered))
        try:
            assert read_whole(path) == TEXT, place
        except UserError as error:
            assert "x.txt" in str(error)


@EACH
def test_zeros_after_the_end_are_padding_where_the_format_allows_them(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"x.{suffix}", COMPRESS[suffix](TEXT) + bytes(20_000))
    if suffix in ("gz", "xz"):
        assert read_whole(path) == TEXT
        joined = path.read_bytes() + COMPRESS[suffix](TEXT)
        assert read_whole(written(tmp_path, f"y.{suffix}", joined)) == TEXT * 2
    else:
        with pytest.raises(UserError, match="follows the end of a whole part"):
            read_whole(path)
    with pytest.raises(UserError, match=r"near byte [0-9,]+ of [0-9,]+ .*no .* data: it begins with b'xx'"):
        read_whole(written(tmp_path, f"z.{suffix}", COMPRESS[suffix](TEXT) + b"xx"))


def test_frames_to_skip_and_long_windows_of_zstd_are_read(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
    path = written(tmp_path, "x.zst", skipped + zstd(TEXT) + skipped + zstd(b"") + zstd(b"end"))
    assert read_whole(path) == TEXT + b"end"
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = written(tmp_path, "long.zst", compressor.compress(TEXT) + compressor.flush())
    assert read_whole(path) == TEXT


def test_a_frame_that_needs_a_dictionary_is_not_called_damaged(tmp_path: Path) -> None:
    samples = [f"sample {number} of some text".encode() * 9 for number in range(200)]
    dictionary = zstandard.train_dictionary(2000, samples)
    path = written(tmp_path, "x.zst", zstandard.ZstdCompressor(dict_data=dictionary).compress(samples[0]))
    with pytest.raises(UserError, match="zstd -d -D") as caught:
        read_whole(path)
    assert "damaged" not in str(caught.value)


def test_plain_text_under_a_compressed_name_is_read_as_it_is(tmp_path: Path) -> None:
    assert read_whole(written(tmp_path, "x.txt.gz", TEXT)) == TEXT
    with pytest.raises(UserError, match="neither compressed as its name says nor plain text"):
        read_whole(written(tmp_path, "y.txt.gz", b"\x00\x8b" + gzip.compress(TEXT)[2:]))


@pytest.mark.parametrize(
    ("head", "remedy"),
    [
        (b"\x04\x22\x4d\x18more", "lz4 -d"),
        (b"PK\x03\x04more", "unzip"),
        (b"7z\xbc\xaf\x27\x1c", "7z x"),
        (b"\x1f\x9dmore", "uncompress"),
    ],
)
def test_other_formats_are_named_with_what_unpacks_them(head: bytes, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"unpack it first .{remedy}"):
        read_whole(written(tmp_path, "x.txt", head))


def test_what_was_compressed_twice_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compressed twice"):
        read_whole(written(tmp_path, "x.txt.gz", gzip.compress(zstd(TEXT))))


def test_a_stream_is_read_in_parts_of_any_size(tmp_path: Path) -> None:
    path = written(tmp_path, "x.zst", zstd(TEXT) * 3)
    with opened(path) as stream:
        assert b"".join(iter(lambda: stream.read(7), b"")) == TEXT * 3
    with opened(path) as stream:
        assert list(stream) == (TEXT * 3).splitlines(keepends=True)


def test_names_of_compressed_files() -> None:
    assert all(map(is_compressed_name, ("a.gz", "A.TGZ", "b.tar.ZST", "c.txt.bz2", "d.xz", "e.tzst")))
    assert not any(map(is_compressed_name, ("a.txt", "b.tar", "c.gzip.txt", "d.jsonl")))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_first_bytes_are_seen_whole_where_the_first_members_hold_few(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(b"".join(map(pack, (b"", b"a", b"", b"bc", b"defgh"))))
    with opened(path) as stream:
        assert stream.peek(4)[:4] == b"abcd" and stream.read() == b"abcdefgh"

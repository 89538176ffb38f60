"""Standard streams that are missing, narrow or broken; whole processes are in test_front_end.py."""

import errno
import io
import os
import sys

import pytest

from mlpmem_ds.core.streams import end_streams, is_left_by_reader, prepare_streams, say


def test_any_text_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    prepare_streams()
    out.write("ü λ \udce9")
    assert end_streams() is None
    assert out.buffer.getvalue() == b"\xfc \\u03bb \\udce9"  # type: ignore[attr-defined]


def test_a_missing_stream_is_the_empty_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stdin", None)
    prepare_streams()
    sys.stdout.write("nothing")
    assert sys.stdin.read() == "" and end_streams() is None


def test_a_broken_stream_gives_its_error_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        stream.write("text")
        failed = end_streams()
        assert failed is not None and failed.errno == errno.EPIPE and end_streams() is None
        monkeypatch.setattr(sys, "stderr", stream)
        say("no one reads it")
    assert not is_left_by_reader(failed), "the pipe was not one of ours"

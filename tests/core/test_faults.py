"""Errors of the machine and of libraries get a remedy; faults of ours do not."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.faults import is_lost_rank, remedy_of


def from_system(number: int, path: str | bytes | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


def raised_while_handling(first: Exception, then: Exception) -> Exception:
    try:
        try:
            raise first
        except Exception:
            raise then  # noqa: B904
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("give --other"), "give --other"),
        (from_system(errno.EFBIG, "/x/y"), "File too large: /x/y; .*ulimit -f"),
        (from_system(errno.EDQUOT), "Disk quota exceeded: while writing; raise the quota"),
        (from_system(errno.EIO, b"/caf\xe9"), "/caf.*; the storage"),
        (from_system(errno.EIO), "^Input/output error; the storage"),  # of reading or of writing: not known
        (from_system(errno.EROFS, "/x"), "/x; the file system is mounted read-only"),
        (from_system(errno.ESTALE, "/x"), "run the same command again"),
        (from_system(errno.EMFILE, "/x"), "ulimit -n"),
        (from_system(errno.ELOOP, "/x"), "links on the way"),
        (from_system(errno.ENAMETOOLONG, "/x"), "shorter"),
        (from_system(errno.ETXTBSY, "/x"), "program"),
        (OSError(errno.ENOSPC, "No space left on device", "/from", None, "/to"), ": /to; free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free some space"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "disk"),
        (raised_while_handling(from_system(errno.ENOSPC), RuntimeError("unexpected pos 5 vs 3")), "space"),
        (OSError("4096 requested and 512 written"), "could not be written whole"),
        (RuntimeError("write error in x: 5 != 10 (No space left on device)"), "free some space"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --batch or --rows"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower"),
        (MemoryError(), "memory ran out \\(MemoryError\\): lower --batch"),
        (RuntimeError("CUDA error: no kernel image is available"), "nvidia-smi"),
        (ModuleNotFoundError("No module named 'faiss'", name="faiss"), "not in this .*pip install faiss-cpu"),
        (ImportError("libx.so.1: cannot open it", name="pyarrow.lib"), "pyarrow does not load"),
        (ImportError("cannot import name 'x' from 'mlpmem_ds.core'", name="mlpmem_ds.core"), "not whole"),
        (UnicodeEncodeError("ascii", "bücher", 1, 2, "ordinal"), "b\\\\xfccher: set PYTHONUTF8=1"),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates"), "caf\\\\udce9 is not UTF-8"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_has_a_remedy(error: Exception, said: str) -> None:
    remedy = remedy_of(error, memory_flags=("--batch", "--rows"))
    assert remedy is not None and "\n" not in remedy
    assert re.search(said, remedy), remedy


class DistBackendError(RuntimeError):
    """As torch.distributed's."""


def test_a_gpu_without_room_for_nccl_is_no_lost_rank() -> None:
    """A supervisor would start all of them again, and it would end as before."""
    first = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
    cause = (
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    )
    full = DistBackendError(f"{first}\n{cause}")
    assert not is_lost_rank(full)
    remedy = remedy_of(full, memory_flags=("--micro-batch-positions",))
    assert (
        remedy is not None and remedy.startswith("memory ran out (NCCL error") and "lower --micro" in remedy
    )
    gone = DistBackendError(f"{first}\nncclRemoteError: A call failed possibly due to a network error")
    assert is_lost_rank(gone) and "another rank has ended" in str(remedy_of(gone))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("x"),
        AssertionError(),
        from_system(errno.EINVAL, "/x"),
        from_system(errno.EBADF),
        raised_while_handling(from_system(errno.ENOENT, "/x"), KeyError("x")),
        RuntimeError("shape mismatch"),
    ],
)
def test_a_fault_of_ours_has_none(error: Exception) -> None:
    assert remedy_of(error) is None


def test_memory_that_numpy_does_not_get() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 55)
    assert "memory ran out" in str(remedy_of(caught.value))


def test_a_package_that_fails_while_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages" / "broken_thing"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('numpy.dtype size changed')")
    monkeypatch.syspath_prepend(folder.parent)
    with pytest.raises(RuntimeError) as caught:
        import broken_thing  # type: ignore[import-not-found]  # noqa: F401
    assert "broken_thing does not load (RuntimeError: numpy.dtype size changed)" in str(
        remedy_of(caught.value)
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n \n  three\r\nfour"), "three"),
        (ValueError(""), "ValueError"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("a\u2028b\x85c"), "a\u2028b\x85c"),
        (ValueError("x" * 1000), "x" * 500 + " …"),
        ("text\nmore", "text"),
        ("", "no message"),
    ],
)
def test_the_first_line_of_an_error(error: Exception | str, line: str) -> None:
    assert first_line(error) == line

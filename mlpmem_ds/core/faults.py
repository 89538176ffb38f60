"""Errors that no stage has foreseen: those of the machine and of libraries get their remedy, and what is left
is a fault of this package, whose traceback goes into a file."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlpmem_ds
from mlpmem_ds.core.errors import FULL_DISK, LostRankError, UserError, first_line

_AGAIN = "run the same command again: it continues where it was"
_SPACE = f"free some space and {_AGAIN}"
_STORAGE = f"the storage, or the way to it, failed: check it and {_AGAIN}"
_NETWORK = f"check the network and {_AGAIN}"
_OPEN_FILES = f"raise the limit on open files (ulimit -n) and {_AGAIN}"
_PROCESSES = "raise the limit on processes and threads (ulimit -u, or the container's), or use fewer"
_PERMISSIONS = "choose another path or change its permissions"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"raise the quota or {_SPACE}",
    errno.EFBIG: "a file may not become so large: raise the limit (ulimit -f), or choose another file system",
    errno.EIO: _STORAGE,
    errno.ENXIO: _STORAGE,
    errno.ENODEV: _STORAGE,
    errno.ESTALE: _STORAGE,
    errno.ENOTCONN: _STORAGE,
    errno.ESHUTDOWN: _STORAGE,
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.EAGAIN: _PROCESSES,
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "it is a directory: choose another path",
    errno.ENOENT: "make its directory, or choose another path",
    errno.EEXIST: "remove it, or choose another path",
    errno.ENOTEMPTY: "empty it, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EILSEQ: "the file system does not take such a name: choose another path",
    errno.ELOOP: "links on the way lead to themselves: remove them, or choose another path",
    errno.EMLINK: "choose another file system",
    errno.EXDEV: "choose a path on the same file system",
    errno.EROFS: "the file system is mounted read-only: mount it anew, or choose another path",
    errno.ETXTBSY: "a program runs from this file: end it, or choose another path",
    errno.EBUSY: "another program has it, or a disk is mounted there: choose another path",
    errno.EDEADLK: _STORAGE,
    errno.ENOLCK: "the file system gives no locks: choose another one",
    errno.ENOSYS: "the file system or the container cannot do this: choose another --output",
    errno.EOPNOTSUPP: "the file system cannot do this: choose another --output",
    errno.ESPIPE: "it is a pipe or a device: give a file",
    errno.ECONNREFUSED: _NETWORK,
    errno.ECONNRESET: _NETWORK,
    errno.ECONNABORTED: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
    errno.EADDRINUSE: "another program has the port: set MASTER_PORT to a free one",
    errno.EADDRNOTAVAIL: "set MASTER_ADDR to the name of rank 0's host",
}
# Of errors that were met on the way, those that still explain what was raised at last.
_LASTING = FULL_DISK | {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
_SAID_BY_LIBRARIES = _LASTING | {errno.EROFS, errno.EACCES}
# What libraries say of a file that could not be written, without the system's number.
_CUT_SHORT = re.compile(
    r"PytorchStreamWriter failed|file write failed|unexpected pos \d+|\d+ requested and \d+ written|"
    r"database or disk is full|File .* cannot be opened\.|Parent directory .* does not exist|basic_ios::clear"
)
_NUMBERED = re.compile(r"os error (\d+)|\[errno (\d+)\]", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|CUDA out of memory|cudaErrorMemoryAllocation|bad_alloc|"
    r"CUBLAS_STATUS_ALLOC_FAILED|failed to allocate|CUDA error: out of memory",
    re.IGNORECASE,
)
_NO_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable")
_GPU = re.compile(
    r"no kernel image|driver version is insufficient|busy or unavailable|ECC error|GPU is lost|"
    r"No CUDA GPUs are available|unspecified launch failure|forward compatibility was attempted"
)
_RANK_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting|Socket Timeout|"
    r"NCCL|recvValue failed|timed out after",
    re.IGNORECASE,
)
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_DISTRIBUTIONS = {"faiss": "faiss-cpu"}  # where the name of pip is not that of import


def remedy_of(error: BaseException, *, memory_flags: Sequence[str] = ()) -> str | None:
    """What is wrong and what the user can do, in a line; None for a fault of this package.

    Args:
        memory_flags: the command's flags that take less memory when they are lowered.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ImportError):
        return _of_import(error)
    for link in _causes(error):
        if isinstance(link, UnicodeEncodeError):
            return _of_encoding(link)
        if isinstance(link, OSError) and link.errno in _REMEDIES and (link is error or _lasts(link)):
            return _of_system(link.errno, link)
        if (text := _of_message(link, memory_flags)) is not None:
            return text
    return _of_broken_package(error)


def is_lost_rank(error: BaseException) -> bool:
    """Whether `remedy_of` says that another rank has ended: all of them are to be started again."""
    if isinstance(error, UserError):
        return isinstance(error, LostRankError)
    return any(_is_of_ranks(link) for link in _causes(error))


def is_failed_write(error: BaseException) -> bool:
    """Whether a file could not be written: the system says so, or a library in words of its own."""
    return not is_lost_rank(error) and any(
        isinstance(link, OSError)
        or _CUT_SHORT.search(first_line(link))
        or _number_in_words(first_line(link)) is not None
        for link in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what was being handled then."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _lasts(error: OSError) -> bool:
    return error.errno in _LASTING


def _of_system(number: int, error: OSError | None = None) -> str:
    place = ": while writing" if number in FULL_DISK else ""
    # The second name is where a copy was written to.
    names = () if error is None else (error.filename2, error.filename)
    if name := next((name for name in names if isinstance(name, str | bytes | os.PathLike)), None):
        place = f": {os.fsdecode(name)}"
    return f"{os.strerror(number)}{place}; {_REMEDIES[number]}"


def _number_in_words(text: str) -> int | None:
    """The system's number of a fault of files that a library tells in the system's words alone."""
    return next((number for number in _SAID_BY_LIBRARIES if os.strerror(number) in text), None)


def _of_message(error: BaseException, memory_flags: Sequence[str]) -> str | None:
    """Of errors that libraries raise under types of their own: known by their words."""
    text = f"{type(error).__name__}: {first_line(error)}"
    ran_out = isinstance(error, MemoryError) or "OutOfMemoryError" in text or _NO_MEMORY.search(text)
    if ran_out or _is_without_gpu_memory(error):
        lower = f"lower {' or '.join(memory_flags)}" if memory_flags else "give it more memory"
        return (
            f"memory ran out ({first_line(error)}): {lower}, or end what else uses the memory, and {_AGAIN}"
        )
    if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
        return None
    if found := _NUMBERED.search(text):
        number = int(found[1] or found[2])
        if number in _REMEDIES:
            return f"{first_line(error)}; {_REMEDIES[number]}"
    if (said := _number_in_words(text)) is not None:
        return f"{first_line(error)}; {_REMEDIES[said]}"
    if _CUT_SHORT.search(text):
        return (
            f"a file could not be written whole ({first_line(error)}): is the disk or a quota full? {_SPACE}"
        )
    if _NO_THREADS.search(text):
        return f"{first_line(error)}: {_PROCESSES}"
    if _GPU.search(text):
        return f"the GPU or its driver does not work ({first_line(error)}): see nvidia-smi, and {_AGAIN}"
    if _is_of_ranks(error):
        return (
            f"another rank has ended, or is out of reach ({first_line(error)}): read what it wrote, {_AGAIN}"
        )
    return None


def _is_of_ranks(error: BaseException) -> bool:
    """Whether it is what torch raises where a rank does not answer."""
    text = f"{type(error).__name__}: {first_line(error)}"
    is_of_torch = type(error).__module__.startswith("torch") or "gloo" in text
    if _is_without_gpu_memory(error):
        return False
    return type(error).__name__.startswith("Dist") or bool(is_of_torch and _RANK_LOST.search(text))


def _is_without_gpu_memory(error: BaseException) -> bool:
    """Whether this rank's GPU had no room for NCCL's buffers, which is said behind the first line."""
    return type(error).__name__.startswith("Dist") and "out of memory" in str(error)


def _of_encoding(error: UnicodeEncodeError) -> str:
    shown = error.object[max(0, error.start - 100) : error.end + 100]
    shown = shown.encode("unicode_escape", "backslashreplace").decode("ascii")
    if error.encoding.lower().replace("-", "") == "utf8":
        return f"{shown} is not UTF-8: rename the file, choose another path, or mend the text"
    return (
        f"this shell's encoding, {error.encoding}, does not have the name {shown}: set PYTHONUTF8=1, or"
        " LC_ALL=C.UTF-8"
    )


def _of_import(error: ImportError) -> str:
    """A package that is missing, or does not load."""
    package = (error.name or "").partition(".")[0] or _package_of(error)
    if package in ("", "mlpmem_ds"):
        return f"this installation of mlpmem-ds is not whole ({first_line(error)}): install it again"
    name = _DISTRIBUTIONS.get(package, package)
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {package} is not in this environment ({sys.executable}): bash launch/setup.sh makes"
            f" one with all that is needed, then source .venv/bin/activate; or pip install {name}"
        )
    return _broken(name, error)


def _of_broken_package(error: BaseException) -> str | None:
    """An error while a package was being imported, by a file of that package."""
    package = _package_of(error)
    is_import = any(frame.name == "<module>" for frame in traceback.extract_tb(error.__traceback__)[1:])
    return _broken(package, error) if is_import and package not in ("", "mlpmem_ds") else None


def _broken(package: str, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return (
        f"the package {package} does not load ({reason}): install it again,"
        f" pip install --force-reinstall {package}"
    )


def _package_of(error: BaseException) -> str:
    """The installed package whose file raised the error; "" where it was none."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    for folder in _PACKAGE_FOLDERS:
        if folder in parts[:-1]:
            return parts[parts.index(folder) + 1].removesuffix(".py")
    return ""


def describe_fault(error: BaseException, *, folder: Path | None, rank: int, prog: str) -> str:
    """The line for the terminal, after the traceback has been written to a file.

    Args:
        folder: the stage's output, if it was begun; else the file is a temporary one.
        prog: the command's name.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    path = _write_traceback(text, folder=folder, rank=rank, prog=prog)
    where = _place_of(error, text)
    kind = type(error).__name__
    reason = "" if first_line(error) == kind else f"{first_line(error)} "
    line = f"{reason}({kind}{where}): this is a fault of mlpmem-ds, please report it"
    return f"{line} with {path}" if path is not None else f"{line} with this:\n{text}"


def _place_of(error: BaseException, text: str) -> str:
    """` in FILE:LINE`, the innermost of this package's; a worker process sends its traceback as text."""
    remote = getattr(error.__cause__, "tb", None)
    text = remote if isinstance(remote, str) else text
    found = re.findall(r'File "(?:[^"\n]*/)?(mlpmem_ds/(?!core/front_end)[^"\n]*)", line (\d+)', text)
    found = found or re.findall(r'File "([^"\n]*)", line (\d+)', text)
    return f" in {found[-1][0]}:{found[-1][1]}" if found else ""


def _write_traceback(text: str, *, folder: Path | None, rank: int, prog: str) -> Path | None:
    """The file's path; None where no directory takes it."""
    lines = [
        f"mlpmem-ds {mlpmem_ds.__version__}, Python {platform.python_version()}, {platform.platform()}",
        " ".join([prog, *map(ascii, sys.argv[1:])]),
        f"rank {rank}\n",
        text,
    ]
    content = "\n".join(lines).encode("utf-8", "backslashreplace")
    if folder is not None:
        with contextlib.suppress(OSError):
            path = folder / f"traceback-{rank}.txt"
            path.write_bytes(content)
            return path
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix=f"{Path(prog).stem}-{rank}-", suffix=".traceback.txt")
        with open(descriptor, "wb") as stream:
            stream.write(content)
        return Path(name)
    return None

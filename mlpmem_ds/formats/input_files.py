"""The files of the inputs that the user named, in a fixed order, and what of them is not read.

A directory is walked in sorted order, folders in the place of their names. Nothing is opened but folders: a
million small files must stay fast.
"""

from __future__ import annotations

import bisect
import dataclasses
import errno
import glob
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.manifest import MARKS_OF_OURS, is_own_directory
from mlpmem_ds.core.names import spell_path
from mlpmem_ds.formats.documents import DATASET_PREFIX, MAY_NOT_BE_READ, SourceFile, source_file
from mlpmem_ds.formats.file_marks import RESOURCE_FORK
from mlpmem_ds.formats.input_names import FILE_PATTERNS, Choice, unused_patterns
from mlpmem_ds.formats.installed_docs import DOCS_PREFIX, path_in_package, place_of_docs
from mlpmem_ds.formats.omissions import REASONS_BY_SUFFIX, Omission, ReasonName, describe_omissions
from mlpmem_ds.formats.saved_datasets import (
    SAVED_DATASET_MARKS,
    datasets_files,
    is_saved_dataset,
    others_of_dataset,
)

_VERSION_CONTROL = {".git", ".hg", ".svn", ".bzr"}
_SYSTEM_FOLDERS = {"__MACOSX", ".Trashes", ".Spotlight-V100", ".fseventsd"}


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """What is to be read, in the order of the corpus, and what is not."""

    files: list[SourceFile]
    omissions: list[Omission]
    unused_patterns: list[str]
    """such as "--exclude old/*": those of the user that match no name"""
    input_stops: list[int]
    """for each input that was named, how many of `files` are of it and those before it"""


def find_files(
    inputs: Sequence[str],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    *,
    output: Path | None = None,
) -> FoundFiles:
    """The files below `inputs` (files, directories, globs, saved or named data sets), sorted by name within
    each input. Inputs that hold files of one name have their folders' names before all of theirs.

    Args:
        inputs: a path that exists is taken as it is spelled, also with the letters of patterns.
        include: patterns that a file's name in a directory must match one of; None = FILE_PATTERNS.
        exclude: patterns; a file is left out if its path below the input, or the name of any directory in it,
            matches one.
        output: what is being written, which may lie in an input: it is passed over.

    Raises:
        UserError: an input does not exist, cannot be read (again), or is an output of this program; or
            nothing is left.
    """
    choice = Choice.of(include, exclude)
    paths_of_inputs = [_paths_of(given) for given in inputs]
    seen: set[str] | None = set() if sum(map(len, paths_of_inputs)) > 1 else None
    files: list[SourceFile] = []
    roots: list[Path] = []  # of each file
    omissions: list[Omission] = []
    input_stops = []
    for paths in paths_of_inputs:
        for path in paths:
            for item in _items_of(path, choice, output):
                if isinstance(item, Omission):
                    omissions.append(item)
                elif seen is not None and (place := _real_place(path, item)) in seen:
                    omissions.append(Omission(name=item.name, reason="already read"))
                else:
                    files.append(item)
                    roots.append(path)
                    if seen is not None:
                        seen.add(place)
        input_stops.append(len(files))
    if not files:
        left_out = "".join(f"; left out: {line}" for line in describe_omissions(omissions))
        raise UserError(
            f"no text files below {', '.join(inputs)}: --include says which names count "
            f"({' '.join(include or FILE_PATTERNS)}), --exclude which do not ({' '.join(exclude) or 'none'})"
            f"{left_out}"
        )
    excluded = [omission.name for omission in omissions if omission.reason == "excluded"]
    unused = {
        "--include": unused_patterns(include or (), (file.name for file in files)),
        "--exclude": unused_patterns(exclude, excluded),
    }
    given = [f"{flag} {pattern}" for flag, patterns in unused.items() for pattern in patterns]
    files = files if seen is None else _told_apart(files, roots)
    return FoundFiles(files=files, omissions=omissions, unused_patterns=given, input_stops=input_stops)


def _told_apart(files: list[SourceFile], roots: list[Path]) -> list[SourceFile]:
    """The files, each of one of `roots`, as inputs that have a name in common would be named below a folder
    that holds them all."""
    first: dict[str, Path] = {}
    shared: set[Path] = set()
    for file, root in zip(files, roots, strict=True):
        other = first.setdefault(file.name, root)
        if other is not root:
            shared |= {other, root}
    if not shared:
        return files
    folder_of = _shortest_names(shared)
    return [
        dataclasses.replace(file, name=f"{folder_of[root]}/{file.name}") if root in folder_of else file
        for file, root in zip(files, roots, strict=True)
    ]


def _shortest_names(roots: Collection[Path]) -> dict[Path, str]:
    """The folder of each input that is a local path: the last parts of its path, as few as tell all apart."""
    parts_of: dict[Path, tuple[str, ...]] = {}
    for root in roots:
        if not str(root).startswith((DATASET_PREFIX, DOCS_PREFIX)):
            folder = root if root.is_dir() else root.parent
            parts_of[root] = Path(os.path.abspath(folder)).parts[1:]
    count, num_folders = 1, len(set(parts_of.values()))
    while len({parts[-count:] for parts in parts_of.values()}) < num_folders:
        count += 1
    return {root: spell_path(Path(*parts[-count:]).as_posix()) for root, parts in parts_of.items()}


def _paths_of(given: str) -> list[Path]:
    """The path that an input names, or those that its pattern matches."""
    if given.startswith((DATASET_PREFIX, DOCS_PREFIX)):
        return [Path(given)]
    if os.path.lexists(Path(given)):  # a Path has no slash at its end
        return [_local(given)]
    matches = [_local(match) for match in sorted(glob.glob(given, recursive=True))]
    for folder in _folders_of_pattern(given):  # glob passes over those that it may not read
        if not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(
                f"--input {given}: the folder {folder} may not be read: change its permissions, or name the"
                " inputs one by one"
            )
    if not matches:
        hint = f"check the path (a data set of the Hub is {DATASET_PREFIX}NAME)"
        if given == "-":
            hint = "write what comes from standard input to a file, because inputs are read twice"
        elif "://" in given:
            hint = "download it first, because inputs are files of this machine"
        raise UserError(f"--input {given} does not exist and matches nothing: {hint}")
    return matches


def _local(name: str) -> Path:
    """The path of a file, which is never taken for another kind of input: `./datasets:x`."""
    path = Path(name)
    return path.absolute() if str(path).startswith((DATASET_PREFIX, DOCS_PREFIX)) else path


def _folders_of_pattern(pattern: str) -> Iterator[str]:
    """The folders in which the names that match a pattern are looked for."""
    parent = os.path.dirname(pattern.rstrip("/"))
    while parent not in ("", "/"):
        yield from filter(os.path.isdir, glob.iglob(parent, recursive=True))
        parent = os.path.dirname(parent)


def _real_place(root: Path, file: SourceFile) -> str:
    """Where a file lies, links of the input's own path followed: one text for each file of the disk.

    The file itself is asked for only where it is the input: within a directory no folder is a link.
    """
    if file.path == root:
        return os.path.realpath(root)
    return os.path.join(os.path.realpath(root), os.path.relpath(file.path, root))


def _items_of(path: Path, choice: Choice, output: Path | None) -> Iterator[SourceFile | Omission]:
    """The files of one path that the user named."""
    if str(path).startswith(DATASET_PREFIX):
        yield SourceFile(path=path, name=spell_path(str(path)), is_named=True)
        return
    if str(path).startswith(DOCS_PREFIX):
        yield from _docs(place_of_docs(str(path)), choice)
        return
    mode = _mode_of(path)
    if not stat.S_ISDIR(mode):
        if not stat.S_ISREG(mode):
            raise UserError(
                f"--input {path} is a pipe, a socket or a device, and inputs are read twice: write what it"
                " gives to a file first, and name that"
            )
        yield SourceFile(path=path, name=spell_path(path.name), is_named=True)
    else:
        yield from _walk(path, choice, output)


def _docs(place: Path, choice: Choice) -> Iterator[SourceFile | Omission]:
    """The Python sources of a package, or of one module; of its other files nothing is asked."""
    name = path_in_package(place).as_posix()
    if any(choice.is_excluded(part) for part in (place.name, name)):
        yield Omission(name=spell_path(name + "/" * place.is_dir()), reason="excluded")
    elif place.is_dir():
        for entry in sorted(place.iterdir()):
            if entry.suffix == ".py" or (entry.is_dir() and entry.name != "__pycache__"):
                yield from _docs(entry, choice)
    else:
        yield source_file(str(place), spell_path(name), is_named=False, kind="docs")


def _mode_of(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(
            f"--input {path} is a link to something that does not exist: restore that, or remove the link"
        ) from error
    except OSError as error:
        remedy = "remove the links" if error.errno == errno.ELOOP else "change its permissions"
        raise UserError(
            f"--input {path} cannot be read ({error.strerror}): {remedy}, or name another path"
        ) from error


def _walk(root: Path, choice: Choice, output: Path | None) -> Iterator[SourceFile | Omission]:
    """The files below a directory; linked folders are not entered."""
    entries = _listing(str(root))
    if isinstance(entries, str):
        raise UserError(f"--input {root} cannot be read ({entries}): change its permissions")
    if _is_own(str(root), entries):
        raise UserError(f"--input {root} is an output of this program: name the directory of the text")
    if _is_dataset(str(root), entries):
        yield from _files_of_dataset(root, "", choice)
        return
    own = _name_below(root, output)
    if own == os.curdir:
        raise UserError(f"--input {root} is also the --output: name another directory for the corpus")
    open_folders = [("", iter(entries))]
    while open_folders:
        prefix, rest = open_folders[-1]
        entry = next(rest, None)
        if entry is None:
            open_folders.pop()
            continue
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            if name == own:
                continue
            entered = _enter(entry, choice)
            if not isinstance(entered, list):
                yield Omission(name=spell_path(f"{name}/"), reason=entered[0], detail=entered[1])
            elif _is_dataset(entry.path, entered):
                yield from _files_of_dataset(root, f"{name}/", choice)
            else:
                open_folders.append((f"{name}/", iter(entered)))
        else:
            yield _source(root, name, _reason_against(entry, name, root, choice))


def _source(root: Path, name: str, against: ReasonName | None) -> SourceFile | Omission:
    """A file of a directory, or the omission for this reason."""
    if against is None:
        return SourceFile(path=root / name, name=spell_path(name), is_named=False)
    detail = os.path.splitext(name)[1] if against in REASONS_BY_SUFFIX else ""
    return Omission(name=spell_path(name), reason=against, detail=spell_path(detail))


def _listing(folder: str) -> list[os.DirEntry[str]] | str:
    """What is in a folder, sorted by name; or why it may not be read.

    Raises:
        UserError: it cannot be read now, as on a disk that fails: no reason to leave its text out.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if error.errno in MAY_NOT_BE_READ:
            return str(error.strerror)
        raise UserError(
            f"--input: the folder {folder} cannot be read ({error.strerror}): run again when it can be"
        ) from error


def _enter(folder: os.DirEntry[str], choice: Choice) -> list[os.DirEntry[str]] | tuple[ReasonName, str]:
    """What is in a folder; or the reason and detail for which it is left out."""
    if choice.is_excluded(folder.name):
        return "excluded", ""
    if folder.name in _VERSION_CONTROL or folder.name in _SYSTEM_FOLDERS:
        return "system file", ""
    entries = _listing(folder.path)
    if isinstance(entries, str):
        return "unreadable", entries
    return ("own output", "") if _is_own(folder.path, entries) else entries


def _is_own(folder: str, entries: Sequence[os.DirEntry[str]]) -> bool:
    """Whether it is an output of ours; what is in it says so already without a file being asked for."""
    return any(_has(entries, name) and is_own_directory(Path(folder), name) for name in MARKS_OF_OURS)


def _is_dataset(folder: str, entries: Sequence[os.DirEntry[str]]) -> bool:
    """Whether `datasets` saved it; likewise."""
    try:
        return any(_has(entries, name) for name in SAVED_DATASET_MARKS) and is_saved_dataset(Path(folder))
    except OSError as error:
        raise UserError(
            f"--input {error.filename or folder} cannot be read ({error.strerror}), and it may be the list of"
            " a saved data set: change its permissions"
        ) from error


def _has(entries: Sequence[os.DirEntry[str]], name: str) -> bool:
    at = bisect.bisect_left(entries, name, key=lambda entry: entry.name)
    try:
        return at < len(entries) and entries[at].name == name and entries[at].is_file()
    except OSError:  # links in a circle
        return False


def _files_of_dataset(root: Path, prefix: str, choice: Choice) -> Iterator[SourceFile | Omission]:
    """The files of a saved data set in its order, and then what else lies in its folders.

    Args:
        root: the input.
        prefix: the data set's folder below it, with a slash at its end; empty where it is the input itself,
            of which --include says nothing.
        choice: of names.
    """
    files = datasets_files(root / prefix)
    for path in files:
        name = path.relative_to(root).as_posix()
        if any(choice.is_excluded(part) for part in (name, *name[len(prefix) :].split("/"))):
            yield Omission(name=spell_path(name), reason="excluded")
        elif prefix and not choice.includes(name):
            yield Omission(name=spell_path(name), reason="not included", detail=path.suffix)
        else:
            yield SourceFile(path=path, name=spell_path(name), is_named=not prefix)
    for path in others_of_dataset(root / prefix, files):
        name = path.relative_to(root).as_posix() + "/" * path.is_dir()
        if choice.is_excluded(path.name) or choice.is_excluded(name):
            yield Omission(name=spell_path(name), reason="excluded")
        else:
            is_cache = path.match("cache-*.arrow")
            yield Omission(
                name=spell_path(name), reason="data set cache" if is_cache else "next to a data set"
            )


def _reason_against(entry: os.DirEntry[str], name: str, root: Path, choice: Choice) -> ReasonName | None:
    """Why an entry that is no folder does not count; None where it is a file to be read."""
    reason = choice.reason_against(name)
    if reason != "excluded" and entry.is_symlink() and (fault := _fault_of_link(entry, root)):
        return fault
    if reason:
        return reason
    if not entry.is_file():
        return "special file"
    if entry.name.startswith("._") and _is_resource_fork(entry.path):
        return "system file"
    return None


def _fault_of_link(link: os.DirEntry[str], root: Path) -> ReasonName | None:
    """Why a link is not followed; None for a link to a file, or to something that is no folder."""
    try:
        mode = os.stat(link.path).st_mode
    except PermissionError:
        return "unreadable"
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise  # of the disk, not of the link
        return "broken link"
    if not stat.S_ISDIR(mode):
        return None
    inside = os.path.join(os.path.realpath(root), "")
    target = os.path.join(os.path.realpath(link.path), "")
    return "already read" if target.startswith(inside) else "linked folder"


def _is_resource_fork(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(len(RESOURCE_FORK)) == RESOURCE_FORK
    except OSError:  # said where the file is read
        return False


def _name_below(root: Path, output: Path | None) -> str | None:
    """The output's name below a directory; None where it lies elsewhere."""
    if output is None:
        return None
    name = os.path.relpath(os.path.realpath(output), os.path.realpath(root))
    return None if name.split(os.sep)[0] == os.pardir else name

import errno
import fnmatch
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish_json
from mlpmem_ds.formats.documents import read_documents
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules

from .toy_inputs import names, reasons, write


def test_directories_are_walked_in_order_and_filtered(tmp_path: Path) -> None:
    for name in ("b/x.py", "a/y.md", "a/tests/z.py", "a/image.png", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    assert names(str(tmp_path)) == ["a/tests/z.py", "a/y.md", "b/x.py", "c.txt"]
    assert names(str(tmp_path), exclude=("tests", "c.*")) == ["a/y.md", "b/x.py"]
    assert names(str(tmp_path / "*" / "x.py")) == ["x.py"]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        names(str(tmp_path / "none"))
    with pytest.raises(UserError, match="- does not exist.*standard input to a file"):
        names("-")
    with pytest.raises(UserError, match="download it first"):
        names("https://example.org/books.txt")
    with pytest.raises(UserError, match="does not exist"):
        names("x" * 5000)
    with pytest.raises(UserError, match="no text files.*--include"):
        names(str(tmp_path))


def test_a_walk_gives_what_sorting_all_paths_gives(tmp_path: Path) -> None:
    """The order and the choice of sorted(rglob) and fnmatch, which files were numbered by before."""
    names = [
        "b.txt",
        "a/z.txt",
        "a-b/x.txt",
        "a.txt",
        "a/b/c.txt",
        "a/b.txt",
        "A/x.TXT",
        ".hidden/x.txt",
        "build/x.txt",
        "a/build/x.txt",
        "a/x.py",
        "c.d/x.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    for exclude in ((), ("build",), ("a/b/*", "A"), ("a/build",), ("*.txt",)):
        wanted = []
        for path in sorted(tmp_path.rglob("*")):
            relative = path.relative_to(tmp_path)
            parts = [relative.as_posix(), *relative.parts]
            is_excluded = any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in exclude)
            if path.is_file() and fnmatch.fnmatch(path.name, "*.txt") and not is_excluded:
                wanted.append(relative.as_posix())
        if wanted:
            assert [file.name for file in find_files([str(tmp_path)], ("*.txt",), exclude).files] == wanted, (
                exclude
            )


def test_links_pipes_and_sockets_have_their_reasons(tmp_path: Path) -> None:
    root, other = tmp_path / "in", tmp_path / "other"
    write(root, "a.txt", "sub/b.txt")
    other.mkdir()
    os.mkfifo(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.getcwd()
        os.chdir(root)  # the path of a socket must be short
        server.bind("socket.txt")
        os.chdir(folder)
    for name, target in {
        "dangling.txt": "nowhere",
        "file.txt": "a.txt",
        "inside": "sub",
        "itself": "itself",
        "root": ".",
        "outside": str(other),
        "up": "..",
    }.items():
        (root / name).symlink_to(target)
    assert names(str(root)) == ["a.txt", "file.txt", "sub/b.txt"]
    assert reasons(root) == {
        "dangling.txt": "broken link",
        "inside": "already read",
        "itself": "broken link",
        "outside": "linked folder",
        "pipe.txt": "special file",
        "root": "already read",
        "socket.txt": "special file",
        "up": "linked folder",
    }
    assert names(str(root / "inside")) == ["b.txt"]  # a link that the user names is followed
    for name, message in {
        "pipe.txt": "pipe.*read twice.*file first",
        "socket.txt": "pipe, a socket",
        "dangling.txt": "link to something that does not exist",
        "itself": "symbolic links.*remove the links",
    }.items():
        with pytest.raises(UserError, match=message):
            names(str(root / name))
    with pytest.raises(UserError, match="device.*read twice"):
        names("/dev/null")


def test_what_may_not_be_read_is_named_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "sub/b.txt", "sub/c/d.txt")
    scandir = os.scandir

    def scan(folder: str) -> Any:
        if folder.endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    (omission,) = find_files([str(tmp_path)], None, ()).omissions
    assert omission == Omission(name="sub/", reason="unreadable", detail="Permission denied")
    with pytest.raises(UserError, match="sub cannot be read .Permission denied"):
        names(str(tmp_path / "sub"))
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("sub"))
    with pytest.raises(UserError, match="folder .*sub may not be read"):
        names(str(tmp_path / "*" / "*.txt"))


def test_a_resource_fork_is_known_by_its_content(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "._notes.txt")
    for name in ("._a.txt", "._b.jsonl.gz"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    assert names(str(tmp_path)) == ["._notes.txt", "a.txt"]
    assert reasons(tmp_path) == {"._a.txt": "system file", "._b.jsonl.gz": "system file"}


def test_outputs_of_this_program_are_no_text(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "corpus/train/documents-00000.jsonl", "export/modeling.py", "other/b.txt")
    publish_json(tmp_path / "corpus" / "identity.json", {"format": "mlpmem-corpus"}, seal=True)
    (tmp_path / "export" / "mlpmem_export.json").write_text('{"format": "mlpmem-export"}')
    (tmp_path / "other" / "manifest.json").write_text('{"format": 3}')
    (tmp_path / "other" / "identity.json").write_text("no JSON")
    assert names(str(tmp_path)) == ["a.txt", "other/b.txt"]
    assert reasons(tmp_path)["corpus/"] == reasons(tmp_path)["export/"] == "own output"
    with pytest.raises(UserError, match="output of this program"):
        names(str(tmp_path / "corpus"))
    found = find_files([str(tmp_path)], None, (), output=tmp_path / "other")
    assert [file.name for file in found.files] == ["a.txt"]
    assert "other/" not in {omission.name for omission in found.omissions}  # it grows while we read


def test_a_saved_dataset_below_a_directory_is_read_in_its_order(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "d/one.arrow", "d/two.arrow", "d/cache-1.arrow", "plain/z.txt")
    (tmp_path / "d" / "state.json").write_text(
        '{"_data_files": [{"filename": "two.arrow"}, {"filename": "one.arrow"}]}'
    )
    (tmp_path / "plain" / "state.json").write_text('{"epoch": 3}')
    assert names(str(tmp_path)) == ["a.txt", "d/two.arrow", "d/one.arrow", "plain/z.txt"]
    assert reasons(tmp_path, include=("*.txt",))["d/two.arrow"] == "not included"


def test_a_file_that_two_inputs_give_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, "d/a.txt", "d/sub/b.txt", "e/c.txt")
    (tmp_path / "link").symlink_to("d")
    for second in ("d", "d/", "link", "d/sub", "d/a.txt", "d/*", "d/**"):
        found = find_files([str(tmp_path / "d"), str(tmp_path / second)], None, ())
        assert [file.name for file in found.files] == ["a.txt", "sub/b.txt"], second
        assert {omission.reason for omission in found.omissions} == {"already read"}
    assert names(str(tmp_path / "d"), str(tmp_path / "e")) == ["a.txt", "sub/b.txt", "c.txt"]


def test_a_path_that_exists_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "data[1]/a.txt", "what?.txt", "whatx.txt", "datasets:mine", "*/b.txt")
    assert names("data[1]/") == ["a.txt"] and names("*") == ["b.txt"]
    assert names("what?.txt") == ["what?.txt"] and names("what[?x].txt") == ["what?.txt", "whatx.txt"]
    assert names("./datasets:mine") == ["datasets:mine"]
    (file,) = find_files(["./datasets:mine"], None, ()).files
    assert file.kind == "text" and file.path.read_text() == "some text"
    assert names("what?.txt/") == ["what?.txt"]


def test_names_of_any_bytes_are_spelled(tmp_path: Path) -> None:
    spelled = {
        b"caf\xe9.txt": r"caf\xe9.txt",
        b"new\nline.txt": "new\nline.txt",
        b"quote\"'.txt": "quote\"'.txt",
        "sep\u2028.txt".encode(): "sep\u2028.txt",
        b"x:1.txt": "x:1.txt",
        rb"caf\xe9.txt": r"caf\x5cxe9.txt",
        b"n" * 251 + b".txt": "n" * 251 + ".txt",
    }
    for name in spelled:
        (tmp_path / os.fsdecode(name)).write_text("text")
    found = find_files([str(tmp_path)], None, ()).files
    assert {os.fsencode(file.path.name): file.name for file in found} == spelled


_NAMES = st.sampled_from(["a.txt", "b.TXT", "c.log", ".git", "d", "e.jpg", "sub", "f.md", "g.py", "README"])
_TREES = st.recursive(
    st.sampled_from(["text", "empty", "latin", "pipe", "dangling", "up", "self"]),
    lambda inner: st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_NAMES, _TREES, min_size=1, max_size=5))
def test_every_entry_of_a_tree_is_a_document_or_named(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        grow(Path(root), tree)
        (Path(root) / "one.txt").write_text("there must be one")
        found = find_files([root], None, ())
        said = {omission.name for omission in found.omissions}
        for file in found.files:
            (read,) = read_documents(file, ReadRules())
            assert read.name == file.name and file.name not in said
            said.add(file.name)
        for folder, folders, files in os.walk(root):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in [*files, *links]:
                path = os.path.relpath(os.path.join(folder, name), root)
                parents = {path[: at + 1] for at, letter in enumerate(path) if letter == "/"}
                assert ({path} | parents) & said, path


def grow(folder: Path, tree: dict[str, Any]) -> None:
    contents = {"text": b"some text", "empty": b" \n", "latin": b"caf\xe9"}
    links = {"dangling": "nowhere", "up": "..", "self": "."}
    for name, what in tree.items():
        path = folder / name
        if isinstance(what, dict):
            path.mkdir()
            grow(path, what)
        elif what in contents:
            path.write_bytes(contents[what])
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(links[what])


def test_a_disk_that_fails_behind_a_link_is_no_broken_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.txt").write_text("text", encoding="utf-8")
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
    real = os.stat

    def stat(path: Any, **kwargs: Any) -> os.stat_result:
        if str(path).endswith("a.txt") and not kwargs:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OSError, match="Input/output error"):
        find_files([str(tmp_path)], None, ())


def test_an_input_that_is_also_the_output_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="also the --output"):
        find_files([str(tmp_path)], None, (), output=tmp_path / "x" / "..")


def test_inputs_that_have_a_name_in_common_are_named_with_their_folders(tmp_path: Path) -> None:
    """Only these, and by as few folders as tell them apart."""
    write(tmp_path, "a/x/1.txt", "a/x/2.txt", "b/y/1.txt", "c/x/1.txt", "d/3.txt")
    a, b, c, d = (str(tmp_path / name) for name in ("a/x", "b/y", "c/x", "d"))
    assert names(a, d) == ["1.txt", "2.txt", "3.txt"]
    assert names(a, b, d) == ["x/1.txt", "x/2.txt", "y/1.txt", "3.txt"]
    assert names(f"{a}/1.txt", f"{b}/1.txt", f"{a}/2.txt") == ["x/1.txt", "y/1.txt", "2.txt"]
    assert names(a, c) == ["a/x/1.txt", "a/x/2.txt", "c/x/1.txt"]
    assert names(str(tmp_path / "*" / "x")) == names(a, c)

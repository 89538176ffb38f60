import fnmatch
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.input_files import TEXT_PATTERNS, find_files


def names(*inputs: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [file.name for file in find_files(inputs, None, exclude).files]


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


def test_patterns_that_are_given_are_all_that_count(tmp_path: Path) -> None:
    for name in ("a.txt", "b.parquet", "c.tar.gz"):
        (tmp_path / name).write_text("text")
    assert [file.name for file in find_files([str(tmp_path)], None, ()).files] == [
        "a.txt",
        "b.parquet",
        "c.tar.gz",
    ]
    assert [file.name for file in find_files([str(tmp_path)], TEXT_PATTERNS, ()).files] == ["a.txt"]

from pathlib import Path

from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.input_names import TEXT_PATTERNS

from .toy_inputs import names, reasons, write


def test_patterns_that_are_given_are_all_that_count(tmp_path: Path) -> None:
    for name in ("a.txt", "b.parquet", "c.tar.gz"):
        (tmp_path / name).write_text("text")
    assert [file.name for file in find_files([str(tmp_path)], None, ()).files] == [
        "a.txt",
        "b.parquet",
        "c.tar.gz",
    ]
    assert [file.name for file in find_files([str(tmp_path)], TEXT_PATTERNS, ()).files] == ["a.txt"]


def test_a_pattern_with_a_slash_is_of_the_path(tmp_path: Path) -> None:
    for name in ("x/a.log", "x/y/b.log", "z/c.log", "d.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found = find_files([str(tmp_path)], ["x/*.log", "d*"], ())
    assert [file.name for file in found.files] == ["d.log", "x/a.log", "x/y/b.log"]
    assert not found.unused_patterns


def test_names_count_in_any_case_and_compressed(tmp_path: Path) -> None:
    wanted = ["BOOK.TXT", "DATA.JSONL.GZ", "Notes.Md", "a.txt.xz", "b.Tar.Zst", "c.py"]
    write(tmp_path, *wanted, "d.json.gz", "e.gz", "txt")
    assert names(str(tmp_path)) == wanted
    assert reasons(tmp_path) == dict.fromkeys(["d.json.gz", "e.gz", "txt"], "unknown name")


def test_every_name_that_does_not_count_has_its_reason(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "README", "x.log", "i.PNG", "v.svg", "m.mp3", "p.pyc", ".DS_Store", "Thumbs.db")
    write(tmp_path, ".git/a.txt", "__MACOSX/._a.txt", "old/b.txt", "b.txt~")
    assert reasons(tmp_path, exclude=("old",)) == {
        ".DS_Store": "system file",
        ".git/": "system file",
        "README": "unknown name",
        "Thumbs.db": "system file",
        "__MACOSX/": "system file",
        "b.txt~": "unknown name",
        "i.PNG": "not text",
        "m.mp3": "not text",
        "old/": "excluded",
        "p.pyc": "not text",
        "v.svg": "unknown name",
        "x.log": "unknown name",
    }
    given = reasons(tmp_path, include=("*.log",), exclude=("READ*",))
    assert given["a.txt"] == "not included" and given["README"] == "excluded"


def test_a_pattern_that_matches_nothing_is_said(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "old/b.txt", "c.log")
    found = find_files([str(tmp_path)], ("*.txt", "*.TXT"), ("old/", "a/build", "*.log", "c*"))
    assert [file.name for file in found.files] == ["a.txt"]
    assert found.unused_patterns == ["--include *.TXT", "--exclude a/build"]

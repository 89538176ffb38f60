"""A directory to a URL: the list last, nothing twice after an interruption, no other directory's mirror."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord
from mlpmem_ds.core.objects import push
from mlpmem_ds.core.objects.contents import LocalDirectory, directories_in
from mlpmem_ds.core.objects.fetch import pull
from mlpmem_ds.core.objects.listing import BEGUN, FILES, Listing, read_listing
from mlpmem_ds.core.objects.push import Push
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.verify import verify
from mlpmem_ds.core.world import World

from ..toy_stage import Config, result_of, run
from .conftest import LISTS, CountingStore, small_directory


def directory_of(root: Path) -> LocalDirectory:
    (directory,) = directories_in(root)
    return directory


def test_a_mirror_has_the_same_files_and_gives_the_same_directory(
    url: str, stage_dir: Path, tmp_path: Path
) -> None:
    store = Store(url)
    pushed = Push(directory_of(stage_dir), store).send()
    assert pushed.is_whole and pushed.num_files == 14
    own = {path.relative_to(stage_dir).as_posix(): path for path in stage_dir.rglob("*") if path.is_file()}
    mirrored = {name for name in store.sizes() if not name.startswith(".mirror/")}
    assert mirrored == set(own)
    assert all(store.read(name) == path.read_bytes() for name, path in own.items())
    pull(store, tmp_path / "copy", flag="SOURCE")
    assert result_of(tmp_path / "copy") == result_of(stage_dir)
    assert run(Config(output=tmp_path / "copy"), World()) == []  # the stage itself takes it as its own


def test_what_makes_a_mirror_whole_is_written_last(memory_url: str, stage_dir: Path) -> None:
    store = CountingStore(memory_url)
    Push(directory_of(stage_dir), store).send()
    sent = [name for name in store.written if name != BEGUN]
    assert sent[-3:] == ["manifest.json", ".mirror/000000.json", FILES]
    for number in range(5):
        assert sent.index(f"part-{number}.npy") < sent.index(f"done/{number}.json")


def test_a_second_push_of_the_same_directory_sends_nothing(url: str, stage_dir: Path) -> None:
    Push(directory_of(stage_dir), Store(url)).send()
    pushed = Push(directory_of(stage_dir), Store(url)).send()
    assert pushed.is_whole and pushed.num_files == 0
    assert not list(stage_dir.glob(".mirror-*"))


@pytest.mark.parametrize(
    "fails_at", ["part-0.npy", "part-3.npy", "done/2.json", "run.json", "manifest.json", FILES]
)
def test_an_interrupted_push_sends_the_rest(url: str, stage_dir: Path, fails_at: str) -> None:
    first = CountingStore(url, fails_at=fails_at)
    with pytest.raises(KeyboardInterrupt):
        Push(directory_of(stage_dir), first, threads=1).send()
    assert read_listing(Store(url)) is None
    second = CountingStore(url)
    assert Push(directory_of(stage_dir), second, threads=1).send().is_whole
    again = set(first.written) & set(second.written)
    assert again <= {"run.json", "manifest.json", ".mirror/000000.json"} and fails_at in second.written


def test_units_are_sent_behind_the_work(memory_url: str, tmp_path: Path) -> None:
    output = tmp_path / "stage"
    with pytest.raises(RuntimeError, match="killed"):
        run(Config(output=output), World(), fail_at="3")
    push = Push(directory_of(output), Store(memory_url))
    assert not push.send().is_whole
    sizes = Store(memory_url).sizes()
    assert {"part-2.npy", "done/2.json"} <= sizes.keys() and not {
        "part-3.npy",
        "manifest.json",
    } & sizes.keys()
    run(Config(output=output), World())
    pushed = push.send()
    assert pushed.is_whole and pushed.num_files == 14 - 6
    assert Push(directory_of(output), Store(memory_url)).is_whole


def test_another_run_is_refused_and_may_replace(memory_url: str, stage_dir: Path, tmp_path: Path) -> None:
    Push(directory_of(stage_dir), Store(memory_url)).send()
    run(Config(output=tmp_path / "other", factor=3), World())
    other = directory_of(tmp_path / "other")
    with pytest.raises(UserError, match="mirror of another directory"):
        Push(other, Store(memory_url))
    assert Push(other, Store(memory_url), replace=True).send().is_whole
    pull(Store(memory_url), tmp_path / "copy", flag="SOURCE")
    assert result_of(tmp_path / "copy") == result_of(tmp_path / "other")


def test_other_bytes_of_the_same_flags_are_refused(memory_url: str, stage_dir: Path, tmp_path: Path) -> None:
    """As a training on other ranks leaves them."""
    Push(directory_of(stage_dir), Store(memory_url)).send()
    (stage_dir / "done/1.json").unlink()
    (stage_dir / "manifest.json").unlink()
    push = Push(directory_of(stage_dir), Store(memory_url))
    assert push.send().num_files == 0  # what is whole stays so while the stage is at work

    run(Config(output=tmp_path / "other", factor=3), World())
    for name in ("part-1.npy", "done/1.json", "manifest.json"):
        shutil.copy(tmp_path / "other" / name, stage_dir / name)
    with pytest.raises(UserError, match=r"holds another part-\d.npy than .*of the same flags and inputs"):
        push.send()


@pytest.mark.parametrize("name", ["manifest.json", "identity.json"])
def test_a_directory_with_a_file_of_our_name_is_mirrored_as_it_is(
    memory_url: str, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "model"
    root.mkdir()
    for each in (name, "weights"):
        (root / each).write_text('{"name": "a page"}')
    assert Push(directory_of(root), Store(memory_url)).send().is_whole
    pull(Store(memory_url), tmp_path / "copy", flag="SOURCE")
    assert result_of(tmp_path / "copy") == result_of(root)
    assert verify(Store(memory_url), flag="SOURCE").faults == ()


def test_a_damaged_file_is_not_sent(memory_url: str, stage_dir: Path) -> None:
    path = stage_dir / "part-1.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(DamagedDataError, match=r"part-1.npy does not have the checksum"):
        Push(directory_of(stage_dir), Store(memory_url)).send()
    assert read_listing(Store(memory_url)) is None


@pytest.fixture(params=["stage", *LISTS])
def listed_dir(request: pytest.FixtureRequest, stage_dir: Path, tmp_path: Path) -> Path:
    """A complete directory of each kind that lists its files; `part-1.npy` is one of them."""
    kind = str(request.param)
    return stage_dir if kind == "stage" else small_directory(tmp_path / kind, kind)


@pytest.mark.parametrize("was_sent", [False, True], ids=["never sent", "sent before"])
def test_a_directory_that_lacks_a_file_of_its_list_is_no_whole_mirror(
    memory_url: str, listed_dir: Path, was_sent: bool
) -> None:
    """Also where an interrupted push has sent that file."""
    if was_sent:
        with pytest.raises(KeyboardInterrupt):
            Push(directory_of(listed_dir), CountingStore(memory_url, fails_at=FILES)).send()
    (listed_dir / "part-1.npy").unlink()
    with pytest.raises(DamagedDataError, match=r"part-1.npy is missing: run the command"):
        Push(directory_of(listed_dir), Store(memory_url)).send()
    assert read_listing(Store(memory_url)) is None


def test_a_unit_that_lacks_a_file_is_not_sent_while_its_stage_is_at_work(
    memory_url: str, stage_dir: Path
) -> None:
    for name in ("manifest.json", "part-1.npy"):
        (stage_dir / name).unlink()
    with pytest.raises(DamagedDataError, match=r"part-1.npy is missing: run the command"):
        Push(directory_of(stage_dir), Store(memory_url)).send()
    assert Store(memory_url).read("done/1.json") is None


def test_a_directory_that_lacks_a_file_does_not_replace_a_whole_mirror(
    memory_url: str, listed_dir: Path
) -> None:
    Push(directory_of(listed_dir), Store(memory_url)).send()
    (listed_dir / "part-1.npy").unlink()
    with pytest.raises(DamagedDataError, match=r"part-1.npy is missing"):
        Push(directory_of(listed_dir), Store(memory_url), replace=True).send()
    assert read_listing(Store(memory_url)) is not None
    assert verify(Store(memory_url), flag="SOURCE").faults == ()


@pytest.mark.parametrize("listed_dir", LISTS, indirect=True)
def test_a_directory_that_is_removed_meanwhile_is_not_damaged(
    memory_url: str, listed_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault_of_file = push.fault_of_file

    def removing(root: Path, record: FileRecord, *, checksum: bool) -> str | None:
        shutil.rmtree(root, ignore_errors=True)
        return fault_of_file(root, record, checksum=checksum)

    monkeypatch.setattr(push, "fault_of_file", removing)
    with pytest.raises(FileNotFoundError):
        Push(directory_of(listed_dir), Store(memory_url)).send()


@pytest.mark.parametrize("listed_dir", LISTS, indirect=True)
@pytest.mark.parametrize("replace", [False, True])
def test_a_directory_that_is_removed_while_it_is_compared_keeps_its_whole_mirror(
    memory_url: str, listed_dir: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """A training removes its older checkpoints at any time."""
    Push(directory_of(listed_dir), Store(memory_url)).send()
    again, open_mirror = directory_of(listed_dir), Push._open

    def removing(self: Push) -> Listing | None:
        shutil.rmtree(listed_dir, ignore_errors=True)
        return open_mirror(self)

    monkeypatch.setattr(Push, "_open", removing)
    with pytest.raises(FileNotFoundError):
        Push(again, Store(memory_url), replace=replace).send()
    assert read_listing(Store(memory_url)) is not None


def test_two_writers_of_one_url_leave_one_whole_mirror(url: str, stage_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(stage_dir, copy)
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda root: Push(directory_of(root), Store(url), threads=2).send(), [stage_dir, copy])
        )
    assert all(pushed.is_whole for pushed in found)
    pull(Store(url), tmp_path / "pulled", flag="SOURCE")
    assert result_of(tmp_path / "pulled") == result_of(stage_dir)


@pytest.fixture
def report_dir(stage_dir: Path) -> Path:
    """A complete stage with files that no unit has made, as a report has them."""
    for name in ("eval.json", "lambda.png", "report.md"):
        (stage_dir / name).write_text(f"of the first grid: {name}")
    return stage_dir


def test_what_is_made_anew_in_a_complete_stage_is_sent_again(memory_url: str, report_dir: Path) -> None:
    """As a report with another grid of λ, whose units stay as they are."""
    push = Push(directory_of(report_dir), Store(memory_url))
    push.send()
    former = read_listing(Store(memory_url))
    (report_dir / "eval.json").write_text("of the other grid: eval.json")
    (report_dir / "audit.json").write_text("new")
    (report_dir / "lambda.png").unlink()
    store = CountingStore(memory_url)
    assert Push(directory_of(report_dir), store, threads=1).send().is_whole
    sent = [name for name in store.written if not name.startswith(".mirror/")]
    assert sent == ["audit.json", "eval.json", "manifest.json"]
    listing = read_listing(store)
    assert listing is not None and former is not None and listing.sha256 != former.sha256
    assert sorted(record.name for record in listing.files) == sorted(directory_of(report_dir).names())
    assert store.read("eval.json") == b"of the other grid: eval.json"
    assert verify(store, flag="SOURCE").faults == () and not list(report_dir.glob(".mirror-*"))


def test_a_push_that_goes_on_knows_what_another_has_sent(memory_url: str, report_dir: Path) -> None:
    """As one that watches, and a command by hand."""
    first, store = Push(directory_of(report_dir), Store(memory_url)), Store(memory_url)
    first.send()
    for text, sender in (("one", Push(directory_of(report_dir), store)), ("three", first)):
        (report_dir / "eval.json").write_text(text)
        assert sender.send().num_files == 2 and store.read("eval.json") == text.encode()
    (report_dir / "eval.json").write_text("one")
    Push(directory_of(report_dir), store).send()
    assert first.send().num_files == 0
    (report_dir / "eval.json").write_text("three")  # which `first` has sent, and the store has lost
    assert first.send().num_files == 2 and store.read("eval.json") == b"three"
    assert verify(store, flag="SOURCE").faults == ()


def test_a_log_that_has_grown_is_no_other_result(memory_url: str, report_dir: Path) -> None:
    push = Push(directory_of(report_dir), Store(memory_url))
    push.send()
    run(Config(output=report_dir), World())  # nothing is missing: it adds to the log
    assert push.send().num_files == 0


@pytest.mark.parametrize("fails_at", ["eval.json", "manifest.json"])
def test_what_is_made_anew_is_sent_by_the_same_command_after_an_interruption(
    memory_url: str, report_dir: Path, fails_at: str
) -> None:
    Push(directory_of(report_dir), Store(memory_url)).send()
    (report_dir / "eval.json").write_text("of the other grid: eval.json")
    with pytest.raises(KeyboardInterrupt):
        Push(directory_of(report_dir), CountingStore(memory_url, fails_at=fails_at)).send()
    assert read_listing(Store(memory_url)) is None
    store = CountingStore(memory_url)
    assert Push(directory_of(report_dir), store).send().is_whole
    assert not any(name.startswith(("part-", "done/")) for name in store.written)
    assert store.read("eval.json") == b"of the other grid: eval.json"
    assert verify(store, flag="SOURCE").faults == ()


@pytest.mark.parametrize(
    ("name", "fault"),
    [("part-1.npy", "missing"), ("done/1.json", "not valid JSON"), ("done/0.json", "gone")],
)
def test_a_stage_that_lacks_a_file_does_not_take_it_from_its_mirror(
    memory_url: str, report_dir: Path, name: str, fault: str
) -> None:
    Push(directory_of(report_dir), Store(memory_url)).send()
    (report_dir / "eval.json").write_text("of the other grid: eval.json")
    if fault == "not valid JSON":
        (report_dir / name).write_text("{")
    else:
        (report_dir / name).unlink()
    with pytest.raises(DamagedDataError, match=f"{name} is {fault}"):
        Push(directory_of(report_dir), Store(memory_url)).send()
    pull(Store(memory_url), report_dir, flag="SOURCE")
    assert (report_dir / "eval.json").read_text() == "of the first grid: eval.json"


def test_an_object_that_vanished_meanwhile_is_no_whole_mirror(memory_url: str, stage_dir: Path) -> None:
    class Losing(Store):
        def write(self, name: str, content: bytes) -> None:
            super().write(name, content)
            if name == "identity.json":
                self.remove("part-1.npy")

    with pytest.raises(UserError, match=r"/part-1.npy is missing, or not what was sent"):
        Push(directory_of(stage_dir), Losing(memory_url)).send()
    assert Push(directory_of(stage_dir), Store(memory_url)).send().is_whole


def test_a_directory_that_is_made_anew_while_it_is_sent_is_no_whole_mirror(
    memory_url: str, tmp_path: Path
) -> None:
    """Its last files would be listed under the identity of the one before."""
    output = tmp_path / "stage"
    with pytest.raises(RuntimeError, match="killed"):
        run(Config(output=output), World(), fail_at="3")
    push = Push(directory_of(output), Store(memory_url))
    push.send()
    shutil.rmtree(output)
    run(Config(output=output, factor=3), World())
    with pytest.raises(UserError, match="stage is another directory than when its push began"):
        push.send()
    assert read_listing(Store(memory_url)) is None
    assert Push(directory_of(output), Store(memory_url), replace=True).send().is_whole
    assert verify(Store(memory_url), flag="SOURCE").faults == ()


def test_what_a_former_push_has_noted_is_not_believed_after_another_directory_was_there(
    memory_url: str, stage_dir: Path, tmp_path: Path
) -> None:
    """Its objects may have the same names and sizes."""
    store = Store(memory_url)
    with pytest.raises(KeyboardInterrupt):
        Push(directory_of(stage_dir), CountingStore(memory_url, fails_at="part-3.npy"), threads=1).send()
    run(Config(output=tmp_path / "other", factor=3), World())
    Push(directory_of(tmp_path / "other"), store, replace=True).send()
    assert Push(directory_of(stage_dir), store, replace=True).send().is_whole
    assert verify(store, flag="SOURCE").faults == ()


def test_replace_sends_a_damaged_mirror_anew(memory_url: str, stage_dir: Path) -> None:
    store = Store(memory_url)
    Push(directory_of(stage_dir), store).send()
    content = store.read("part-1.npy")
    assert content is not None
    store.write("part-1.npy", content[:-1] + b"X")
    store.remove("part-2.npy")
    assert len(verify(store, flag="SOURCE").faults) == 2
    assert Push(directory_of(stage_dir), store, replace=True).send().num_files == 14
    assert verify(store, flag="SOURCE").faults == ()

"""`mirror` as a command, the example of its page, and a pipeline whose directories all lie in a store."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import threading
import uuid
from pathlib import Path

import pytest

from mlpmem_ds import commands
from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.core.objects import push
from mlpmem_ds.core.objects.contents import directories_in
from mlpmem_ds.core.objects.listing import FILES, read_listing
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.verify import verify
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.mirroring import mirror
from mlpmem_ds.stages.targets import write_targets

from ...core import toy_stage
from .conftest import run

ROOT = Path(__file__).parents[3]
INDEX = ("--factory", "IVF4,PQ4x4")
TARGETS = ("--search", "ivf", "--k", "8", "--shard-positions", "512", "--exclude", "same-document")


@pytest.fixture
def run_dir(tmp_path: Path, corpus_dir: Path, keys_dir: Path) -> Path:
    root = tmp_path / "run"
    for source in (corpus_dir, keys_dir):
        shutil.copytree(source, root / source.name)
    return root


def test_the_example_of_the_page_runs(
    run_dir: Path,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/objects.md").read_text(encoding="utf-8")
    found = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert found is not None
    lines = [line.partition(" #")[0] for line in found[1].splitlines()]
    for line in lines:
        words = shlex.split(line.replace("s3://bucket/run", url))
        assert words[0] == "python"
        run([*words[1:], *(INDEX if "build_index" in line else ())])
    said = capsys.readouterr().out
    assert f"{url}/corpus: sent" in said and f"{url}/keys: 10 files" not in said
    assert sha256_of_file(tmp_path / "elsewhere/keys/manifest.json") == sha256_of_file(
        run_dir / "keys/manifest.json"
    )
    assert said.splitlines()[-1].endswith(f"{url}/keys") and "not in use" in said
    assert Store(f"{url}/index").read("manifest.json") == Path("index/manifest.json").read_bytes()


def test_every_directory_in_the_store_gives_the_same_checksums(
    run_dir: Path, url: str, base_dir: Path, tmp_path: Path
) -> None:
    """Keys, index and targets; train, evaluate and convert: tests/cluster/test_objects.py."""
    local = tmp_path / "local"
    build_index.run(
        build_index.Config(keys=run_dir / "keys", output=local / "index", factory="IVF4,PQ4x4"), World()
    )
    write_targets.run(
        write_targets.Config(
            keys=run_dir / "keys",
            index=local / "index",
            corpus=run_dir / "corpus",
            search="ivf",
            k=8,
            shard_positions=512,
            exclude="same-document",
            output=local / "targets",
        ),
        World(),
    )
    away = tmp_path / "away"
    run(["mirror", run_dir / "corpus", f"{url}/corpus"])
    run(["mirror", base_dir, f"{url}/base"])
    source = ("--corpus", f"{url}/corpus")
    run(
        [
            "extract_keys",
            "--model",
            f"{url}/base",
            *source,
            "--unit-positions",
            256,
            "--output",
            away / "keys",
        ]
    )
    run(["mirror", away / "keys", f"{url}/keys"])
    run(["build_index", "--keys", f"{url}/keys", *INDEX, "--output", away / "index"])
    run(["mirror", away / "index", f"{url}/index"])
    keys = ("--keys", f"{url}/keys", "--index", f"{url}/index")
    run(["write_targets", *keys, *source, *TARGETS, "--output", away / "targets"])
    for name, expected in (("keys", run_dir), ("index", local), ("targets", local)):
        assert sha256_of_file(away / name / "manifest.json") == sha256_of_file(
            expected / name / "manifest.json"
        )


def test_a_stage_is_watched_until_it_is_there(
    keys_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its units are there before it is complete."""
    url, output = f"file://{tmp_path}/store/keys", tmp_path / "keys"
    shutil.copytree(keys_dir, output)
    (output / "manifest.json").rename(tmp_path / "manifest.json")
    watch = threading.Thread(target=run, args=[["mirror", output, url, "--watch", "--watch-seconds", ".05"]])
    watch.start()
    store = Store(url)
    while len([name for name in store.sizes("done") if name.endswith(".json")]) < len(
        list((output / "done").glob("*.json"))
    ):
        watch.join(0.05)
        assert watch.is_alive()
    assert store.read("manifest.json") is None
    (tmp_path / "manifest.json").rename(output / "manifest.json")
    watch.join(30)
    assert not watch.is_alive()
    run(["mirror", url, "--verify"])


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the first pause."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror.time, "sleep", interrupt)


@pytest.mark.usefixtures("interrupted")
def test_a_directory_that_is_not_there_yet_is_waited_for_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name may be a wrong one."""
    assert commands.mirror([str(tmp_path / "run"), f"file://{tmp_path}/store", "--watch"]) == 130
    assert f"{tmp_path / 'run'} does not exist yet: waiting" in capsys.readouterr().err


@pytest.mark.usefixtures("interrupted")
def test_a_run_that_holds_logs_alone_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As that of a job that has just been submitted."""
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/jobs").write_text("7 keys\n")
    assert commands.mirror([str(tmp_path / "run"), f"file://{tmp_path}/store", "--watch"]) == 130
    assert f"{tmp_path / 'run'} holds no stage yet: waiting" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_stage_that_lacks_a_file_is_an_error_at_the_first_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be waited for in vain."""
    toy_stage.run(toy_stage.Config(output=tmp_path / "stage"), World())
    (tmp_path / "stage/part-1.npy").unlink()
    assert commands.mirror([str(tmp_path / "stage"), f"file://{tmp_path}/store", "--watch"]) == 2
    assert "stage/part-1.npy is missing: run the command that wrote it again" in capsys.readouterr().err


def test_a_model_is_not_watched(base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to wait for."""
    assert commands.mirror([str(base_dir), f"file://{tmp_path}/store", "--watch"]) == 2
    assert "is a model: leave --watch out" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_an_empty_directory_is_no_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where the disk of a run is not mounted: it would be whole, and hold nothing."""
    (tmp_path / "run").mkdir()
    assert commands.mirror([str(tmp_path / "run"), f"file://{tmp_path}/store/run"]) == 2
    assert "run holds no file: give a directory that does; is its disk mounted?" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_damaged_object_and_a_missing_mirror_are_exit_code_2(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/store/run"
    run(["mirror", run_dir, url])
    path = next((tmp_path / "store/run/keys").glob("keys-*.npy"))
    path.write_bytes(path.read_bytes()[:-1])
    for words in ([url, "--verify"], [url, str(tmp_path / "copy")], [f"{url}/none", str(tmp_path / "copy2")]):
        assert commands.mirror(words) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said
    assert commands.mirror([f"{url}/keys", "--verify"]) == 2
    assert path.name in capsys.readouterr().err


def test_a_run_of_which_a_stage_is_not_whole_is_no_verified_run(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its whole stages are fetched all the same."""
    url, store = f"file://{tmp_path}/store/run", tmp_path / "store/run"
    run(["mirror", run_dir, url])
    (store / "keys" / FILES).unlink()
    assert commands.mirror([url, "--verify"]) == 2
    assert f"{url}/keys is not whole: its push has not ended: run it again" in capsys.readouterr().err
    run(["mirror", url, tmp_path / "copy"])
    assert "is not whole" in capsys.readouterr().err and not (tmp_path / "copy" / "keys").exists()
    assert (tmp_path / "copy" / "corpus" / "manifest.json").is_file()


def test_a_mirror_whose_name_leads_elsewhere_is_not_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of object stores are any text."""
    output, url = tmp_path / "stage", f"memory://{uuid.uuid4().hex}/run"
    toy_stage.run(toy_stage.Config(output=output), World())
    for name in ("stage", "../mine"):
        push.Push(directories_in(output)[0], Store(f"{url}/{name}")).send()
    (tmp_path / "copies").mkdir()
    assert commands.mirror([url, str(tmp_path / "copies/copy")]) == 2
    assert f"{url}/../mine names a directory outside {url}" in capsys.readouterr().err
    assert list((tmp_path / "copies").iterdir()) == []


@pytest.mark.parametrize("fails_at", ["3", None], ids=["at work", "whole"])
@pytest.mark.parametrize("replace", [False, True], ids=["refused", "replaced"])
def test_a_stage_that_is_made_anew_while_it_is_watched_is_another_directory(
    fails_at: str | None,
    replace: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its files are never listed as those of the stage that was there before."""
    output, url = tmp_path / "run/stage", f"file://{tmp_path}/store"
    with contextlib.suppress(RuntimeError):
        toy_stage.run(toy_stage.Config(output=output), World(), fail_at=fails_at)
    former = directories_in(output)[0].of()
    looks = 0

    def make_anew(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt
        if looks == 1:
            shutil.rmtree(output)
            toy_stage.run(toy_stage.Config(output=output, factor=3), World())

    monkeypatch.setattr(mirror.time, "sleep", make_anew)
    words = [str(tmp_path / "run"), url, "--watch", *(["--replace"] if replace else [])]
    assert commands.mirror(words) == 130
    said, listing = capsys.readouterr().err, read_listing(Store(f"{url}/stage"))
    assert "of the same flags" not in said
    if replace:
        assert listing is not None and listing.of == directories_in(output)[0].of() != former
        assert verify(Store(f"{url}/stage"), flag="SOURCE").faults == ()
        assert said.count("all files are sent again") == 1
    else:
        assert "/stage is the mirror of another directory than" in said
        assert (listing is None) if fails_at else (listing is not None and listing.of == former)

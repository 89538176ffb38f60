"""`mirror` and a training's checkpoints: sent with it, watched, removed meanwhile, fetched and verified."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlpmem_ds import commands
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import FileRecord, publish_json, record_file
from mlpmem_ds.core.objects import push
from mlpmem_ds.core.objects.listing import BEGUN, FILES
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.mirroring import mirror

from ...core import toy_stage
from .conftest import run

STEP = "checkpoints/step-00000010"


@pytest.fixture
def trained_dir(tmp_path: Path) -> Path:
    """RUN/memory, complete, with a checkpoint."""
    output = tmp_path / "run/memory"
    toy_stage.run(toy_stage.Config(output=output), World())
    step = output / STEP
    step.mkdir(parents=True)
    (step / "weights.pt").write_bytes(b"weights")
    values = {"format": "mlpmem-checkpoint", "files": [record_file(step, "weights.pt").to_json()]}
    publish_json(step / "manifest.json", values, seal=True)
    return output


@pytest.fixture(params=["gone", "still there"])
def removed_while_sent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training removes a checkpoint whose weights are about to be sent; or is still at it."""
    send = push.send_file

    def removing(store: Store, name: str, path: Path, expected: FileRecord | None) -> FileRecord:
        if name == "weights.pt":
            (path.parent / "manifest.json").unlink()
            path.unlink() if request.param == "still there" else shutil.rmtree(path.parent)
        return send(store, name, path, expected)

    monkeypatch.setattr(push, "send_file", removing)


@pytest.mark.usefixtures("removed_while_sent")
def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(keys_dir: Path, tmp_path: Path) -> None:
    """A training keeps its newest ones only."""
    output, url = tmp_path / "memory", f"file://{tmp_path}/store/memory"
    shutil.copytree(keys_dir, output)
    step = output / STEP
    step.mkdir(parents=True)
    (step / "weights.pt").write_bytes(b"weights")
    publish_json(step / "manifest.json", {"files": [record_file(step, "weights.pt").to_json()]}, seal=True)
    run(["mirror", output, url, "--watch", "--watch-seconds", ".05", "--checkpoints"])
    assert Store(url).read(FILES) is not None
    run(["mirror", url, "--verify"])  # it is no mirror whose push has not ended


@pytest.mark.parametrize("is_run", [False, True], ids=["stage", "run"])
def test_checkpoints_are_fetched_and_verified_with_their_training(
    trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_run: bool
) -> None:
    """Of a finished one, if they are asked for. The same command again continues, and finds all there."""
    source = trained_dir.parent if is_run else trained_dir
    url, copy = f"file://{tmp_path}/store/{source.name}", tmp_path / "copy"
    run(["mirror", source, url, "--checkpoints"])
    run(["mirror", url, tmp_path / "alone"])
    assert list((tmp_path / "alone").rglob("manifest.json")) and not list(
        (tmp_path / "alone").rglob("step-*")
    )
    for _ in range(2):
        run(["mirror", url, copy, "--checkpoints"])
        assert toy_stage.result_of(copy) == toy_stage.result_of(source)
    run(["mirror", url, "--verify"])
    capsys.readouterr()
    place = tmp_path / "store" / trained_dir.relative_to(source.parent) / STEP
    (place / "weights.pt").write_bytes(b"weightz")
    assert commands.mirror([url, "--verify"]) == 2
    assert f"{STEP}/weights.pt does not have its checksum" in capsys.readouterr().err
    (place / FILES).unlink()
    assert commands.mirror([url, "--verify"]) == 2
    assert f"{STEP} is not whole" in capsys.readouterr().err


def test_checkpoints_of_a_training_that_is_not_whole_are_not_all_of_it(
    trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/store/memory"
    run(["mirror", trained_dir, url, "--checkpoints"])
    (tmp_path / "store/memory" / FILES).unlink()
    assert commands.mirror([url, "--verify"]) == 2
    assert f"{url} is not whole" in capsys.readouterr().err


@pytest.fixture
def looks(trained_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[the look that --watch is at], of three at most: from the second on the training is complete, and its
    checkpoint there."""
    later, found = tmp_path / "later", [1]
    later.mkdir()
    for name in ("manifest.json", "checkpoints"):
        (trained_dir / name).rename(later / name)

    def pause(seconds: float) -> None:
        found[0] += 1
        assert found[0] <= 3
        for path in later.iterdir():
            path.rename(trained_dir / path.name)

    monkeypatch.setattr(mirror.time, "sleep", pause)
    return found


def test_a_training_is_watched_until_its_checkpoints_are_there_too(
    trained_dir: Path, looks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is complete at the second look, of which a checkpoint cannot be sent."""
    url, send = f"file://{tmp_path}/store/memory", push.send_file

    def failing(store: Store, name: str, path: Path, expected: FileRecord | None) -> FileRecord:
        if name == "weights.pt" and looks == [2]:
            raise UserError("the store cannot be reached")
        return send(store, name, path, expected)

    monkeypatch.setattr(push, "send_file", failing)
    run(["mirror", trained_dir, url, "--watch", "--checkpoints"])
    assert looks == [3] and Store(url).read(f"{STEP}/{FILES}") is not None


def cut_off(trained_dir: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed while it sends the checkpoint."""

    def killed(store: Store, name: str, path: Path, expected: FileRecord | None) -> FileRecord:
        if path == trained_dir / STEP / "weights.pt":
            raise KeyboardInterrupt
        return send(store, name, path, expected)

    send = push.send_file
    with monkeypatch.context() as patch:
        patch.setattr(push, "send_file", killed)
        assert commands.mirror([str(trained_dir), url, "--checkpoints"]) == 130
    assert Store(f"{url}/{STEP}").read(BEGUN) is not None


@pytest.mark.parametrize("flags", [(), ("--watch", "--watch-seconds", ".05")], ids=["run", "watched stage"])
def test_a_checkpoint_that_was_removed_before_it_was_sent_is_withdrawn(
    trained_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: Sequence[str],
) -> None:
    """No push could end it; what the store has of others stays."""
    place, other = f"file://{tmp_path}/store/run/memory", "checkpoints/step-00000008"
    source, url = (trained_dir, place) if flags else (trained_dir.parent, f"file://{tmp_path}/store/run")
    shutil.copytree(trained_dir / STEP, trained_dir / other)
    cut_off(trained_dir, place, monkeypatch)
    assert commands.mirror([url, "--verify"]) == 2
    assert "run it again with --checkpoints" in capsys.readouterr().err
    for step in (STEP, other):
        shutil.rmtree(trained_dir / step)
    run(["mirror", source, url, "--checkpoints", *flags])
    run(["mirror", url, "--verify"])
    assert Store(f"{place}/{STEP}").read(BEGUN) is None
    assert Store(f"{place}/{other}").read(FILES) is not None


@pytest.mark.usefixtures("removed_while_sent")
def test_a_half_of_a_removed_checkpoint_is_withdrawn_when_the_store_is_there_again(
    trained_dir: Path,
    looks: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A store that is away at this moment does not end the watch."""
    url, withdraw = f"file://{tmp_path}/store/memory", mirror.withdraw

    def failing(store: Store) -> None:
        if looks == [2]:
            raise UserError("the store cannot be reached")
        withdraw(store)

    monkeypatch.setattr(mirror, "withdraw", failing)
    run(["mirror", trained_dir, url, "--watch", "--checkpoints"])
    assert looks == [3] and "the store cannot be reached" in capsys.readouterr().err
    run(["mirror", url, "--verify"])


@pytest.mark.usefixtures("removed_while_sent")
def test_a_checkpoint_that_is_removed_while_all_is_sent_once_is_passed_over(
    trained_dir: Path, tmp_path: Path
) -> None:
    run(["mirror", trained_dir, f"file://{tmp_path}/store/memory", "--checkpoints", "--verify"])

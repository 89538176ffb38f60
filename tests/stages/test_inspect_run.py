import json
import shutil
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.inspect_run import Config, run


@pytest.fixture
def run_dir(corpus_dir: Path, keys_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus_dir, tmp_path / "run" / "corpus")
    shutil.copytree(keys_dir, tmp_path / "run" / "keys")
    return tmp_path / "run"


def inspect(run_dir: Path, output: Path) -> dict[str, dict]:
    run(Config(run=run_dir, output=output), World())
    return {Path(state["root"]).name: state for state in json.loads(output.read_text())}


def test_a_good_run_is_complete(run_dir: Path, tmp_path: Path) -> None:
    states = inspect(run_dir, tmp_path / "found.json")
    assert {name: state["complete"] for name, state in states.items()} == {"corpus": True, "keys": True}
    on_disk = sum(path.stat().st_size for path in run_dir.glob("keys/*.npy"))
    assert states["keys"]["bytes"] > on_disk > 0


def test_an_unfinished_stage_is_not_damaged(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "keys" / "manifest.json").unlink()
    assert inspect(run_dir, tmp_path / "found.json")["keys"]["complete"] is False


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest"])
def test_every_harm_is_found_and_named(run_dir: Path, harm: str) -> None:
    victim = run_dir / "keys" / ("manifest.json" if harm == "manifest" else "values-000000000256.npy")
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[-1] ^= 4
        victim.write_bytes(content)
    elif harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[:-3])
    with pytest.raises(DamagedDataError, match="manifest" if harm == "manifest" else "values-000000000256"):
        run(Config(run=run_dir), World())


def test_a_remade_input_is_pointed_out(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = run_dir / "corpus" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with caplog.at_level("WARNING"):
        run(Config(run=run_dir), World())
    assert "its corpus is not the one in this run directory" in caplog.text


def test_a_strange_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no stage of ours"):
        run(Config(run=tmp_path), World())
    with pytest.raises(UserError, match="not a directory"):
        run(Config(run=tmp_path / "none"), World())

"""Ranks that search together, each the lists that it owns: the bytes of one, also after one is killed."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.host import machine_id
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.engines.collectives.ranks import RanksLost
from mlpmem_ds.stages import stage_ranks
from mlpmem_ds.stages.targets import calls, write_targets
from mlpmem_ds.stages.targets.calls import num_calls
from mlpmem_ds.stages.targets.units import ShardWriter

from ...launcher_environment import environment_without_launchers
from .conftest import COMPACT, config, result_of

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).with_name("rank_program.py")
MPIRUN = Path(sys.executable).parent / "mpirun"


RunTogether = Callable[..., tuple[int, str]]


@pytest.fixture
def run_together(forked_commands: Path) -> RunTogether:
    """run_together(config, how, size) -> (the worst exit code of ranks not killed, what they said)."""
    return partial(_run_together, forked_commands / "python")


def _run_together(
    forked_python: Path,
    wanted: write_targets.Config,
    how: str,
    size: int,
    *,
    killed: int = -1,
    call: int = 0,
    launcher: list[str] | None = None,
) -> tuple[int, str]:
    path = wanted.output.with_suffix(".config")
    path.write_bytes(pickle.dumps(wanted))
    environment = environment_without_launchers()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if launcher is None:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*(launcher or []), forked_python, PROGRAM, how, size, path, killed, call]
    command = [str(word) for word in words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("how", "size"), [("torch", 2), ("torch", 3), ("torch", 8), ("files", 3)])
def test_ranks_that_search_together_give_the_bytes_of_one(
    keys: Path, index: Path, compact: Path, tmp_path: Path, how: str, size: int, run_together: RunTogether
) -> None:
    changes: dict[str, Any] = {**COMPACT, "index": index, "exchange": how}
    wanted = config(keys, tmp_path / "targets", **changes)
    code, said = run_together(wanted, how, size)
    assert code == 0, said
    assert result_of(wanted.output) == result_of(compact)
    assert not list(wanted.output.glob(".*")), "nothing hidden is left"
    lines = [wanted.output.with_suffix(f".hashed-{rank}").read_text() for rank in range(size)]
    hashed = Counter(path for text in lines for path in text.splitlines() if not path.endswith(".json"))
    inputs = [*keys.glob("keys-*"), *keys.glob("values-*"), *index.glob("shard-*")]
    assert [hashed[str(path)] for path in inputs] == [1] * len(inputs), "each by one rank, once"


@pytest.mark.skipif(not MPIRUN.is_file(), reason="mpirun is not installed")
def test_ranks_of_mpirun_give_the_bytes_of_one(
    keys: Path, index: Path, compact: Path, tmp_path: Path, run_together: RunTogether
) -> None:
    pytest.importorskip("mpi4py")
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index, exchange="mpi")
    launcher = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    code, said = run_together(wanted, "mpi", 2, launcher=launcher)
    assert code == 0, said
    assert result_of(wanted.output) == result_of(compact)


def test_when_a_rank_is_killed_those_that_exchange_files_finish_by_themselves(
    keys: Path, index: Path, compact: Path, tmp_path: Path, run_together: RunTogether
) -> None:
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index, exchange="files")
    code, said = run_together(wanted, "files", 3, killed=1, call=3)
    assert code == 0 and "goes on by itself" in said and "rank 1" in said, said
    assert result_of(wanted.output, without_lists=True) == result_of(compact)


def test_when_a_rank_is_killed_the_next_start_goes_on(
    keys: Path, index: Path, compact: Path, tmp_path: Path, run_together: RunTogether
) -> None:
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index, exchange="torch")
    code, said = run_together(wanted, "torch", 2, killed=1, call=7)
    assert code == 75 and "run the same command again" in said, said
    done = {path.name for path in (wanted.output / "done").glob("knn-*.json")}
    assert 1 <= len(done) < 4, done
    code, said = run_together(wanted, "torch", 3)
    assert code == 0, said
    assert result_of(wanted.output) == result_of(compact)


def test_ranks_search_alone_only_on_the_cpus_of_one_host_that_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Two:
        size = 2
        other: tuple[str, str, int]

        def gather(self, value: Any) -> list[Any]:
            return [value, self.other]

    class Search:
        device = torch.device("cpu")

    two: Any = Two()
    search: Any = Search()
    monkeypatch.setattr(calls, "free_host_bytes", lambda: 1000)
    for other, expected in [
        ((machine_id(), "cpu", 1000), False),
        ((machine_id(), "cuda", 1000), True),
        ((machine_id(), "cpu", 600), True),
        (("elsewhere", "cpu", 1000), True),
    ]:
        two.other = other
        assert calls.own_lists("auto", two, search, 500) is expected
        assert calls.own_lists("mpi", two, search, 500) is True
    assert calls.own_lists("auto", Alone(), search, 500) is False


@pytest.mark.parametrize(
    "damaged", ["frequency_order.npy", "done/weighting.json", "knn-000000000104-104.tar"]
)
def test_ranks_mend_what_is_damaged_in_complete_targets(
    keys: Path, index: Path, compact: Path, tmp_path: Path, damaged: str, run_together: RunTogether
) -> None:
    """The lists are gone by then, and all ranks make them again where one of them needs them."""
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index, exchange="torch")
    shutil.copytree(compact, wanted.output)
    path = next(wanted.output.glob(damaged))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, said = run_together(wanted, "torch", 3)
    assert code == 0, said
    assert result_of(wanted.output) == result_of(compact)


def test_ranks_that_search_alone_make_the_lists_of_a_missing_shard_together(
    keys: Path, index: Path, compact: Path, tmp_path: Path, run_together: RunTogether
) -> None:
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index)
    shutil.copytree(compact, wanted.output)
    for path in (wanted.output / "manifest.json", wanted.output / "done/knn-000000000104.json"):
        path.unlink()
    code, said = run_together(wanted, "torch", 3)
    assert code == 0, said
    assert result_of(wanted.output) == result_of(compact)


def test_a_rank_that_is_lost_while_the_sample_is_measured_takes_no_record_away(
    keys: Path, undisturbed: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(Alone):
        """Two ranks, the other of which ends before the wait of this number."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.size, self.left = 2, number

        def wait(self) -> None:
            self.left -= 1
            if not self.left:
                raise RanksLost([1], "has failed")

    wanted = config(keys, tmp_path / "targets", index=index, search="ivf", nprobe=3)
    shutil.copytree(undisturbed, wanted.output)
    records = {path.name for path in wanted.output.glob("done/*.json")}
    for number in range(1, 4):
        monkeypatch.setattr(stage_ranks, "open_ranks", lambda *_, **__: Lost(number))  # noqa: B023
        with pytest.raises(RanksLost):
            write_targets.run(wanted, World(rank=0, size=2))
        assert {path.name for path in wanted.output.glob("done/*.json")} == records
        assert (wanted.output / "identity.json").is_file()


def test_ranks_that_exchange_files_and_are_refused_leave_the_lists_alone(
    keys: Path, index: Path, tmp_path: Path, run_together: RunTogether
) -> None:
    changes = {**COMPACT, "neighbour_perplexity": 19.99, "exclude_window": 190}
    wanted = config(keys, tmp_path / "targets", **changes, index=index, exchange="files")
    code, said = run_together(wanted, "files", 2)
    assert code == 2 and "cannot be reached" in said, said
    assert {path.name for path in wanted.output.iterdir()} == {"lists"}


@pytest.mark.parametrize("exchange", ["none", "files"])
def test_ranks_refuse_an_output_that_is_a_file(
    keys: Path, index: Path, tmp_path: Path, exchange: Any
) -> None:
    (tmp_path / "targets").write_text("mine")
    wanted = config(keys, tmp_path / "targets", **COMPACT, index=index, exchange=exchange)
    with pytest.raises(UserError, match="is a file"):
        write_targets.run(wanted, World(rank=1, size=2))
    assert (tmp_path / "targets").read_text() == "mine"


def test_the_calls_of_the_rank_with_most_are_counted() -> None:
    class Writer:
        shards = {str(first): Block(first, stop) for first, stop in split_blocks(1000, 104)}
        call_positions = 40
        calls = ShardWriter.calls

    writer: Any = Writer()
    assert num_calls(writer, list(writer.shards), 3) == 3 + 3 + 3 + 2
    assert num_calls(writer, list(writer.shards)[-1:], 3) == 2  # the last shard has 64 positions
    assert sum(block.size for block in writer.calls(writer.shards["936"])) == 64

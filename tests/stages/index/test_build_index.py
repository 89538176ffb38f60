"""build_index: the same files from any number of ranks and threads, after a kill and after damage; stock
faiss reads them."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.index.factory import index_bytes
from mlpmem_ds.stages.retrieval.shard_lists import map_lists

from ...launcher_environment import environment_without_launchers

NUM_KEYS, DIM = 1003, 16
FORKED_INDEX = Path(__file__).with_name("forked_index.py")


def result_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "log.jsonl")
    }


def vectors(dtype: type = np.int8) -> np.ndarray:
    generator = np.random.default_rng(0)
    centres = generator.integers(-80, 80, size=(20, DIM))
    return (
        centres[generator.integers(0, 20, NUM_KEYS)] + generator.integers(-20, 20, (NUM_KEYS, DIM))
    ).astype(dtype)


@pytest.fixture(scope="module")
def keys(make_keys: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = np.random.default_rng(1).integers(0, 50, NUM_KEYS)
    return make_keys(tmp_path_factory.mktemp("keys") / "keys", vectors(), values)


def config(keys_dir: Path, output_dir: Path, **changes: object) -> build_index.Config:
    return build_index.Config(
        **{"keys": keys_dir, "output": output_dir, "factory": "IVF8,PQ4", "num_shards": 3, **changes}
    )


@pytest.fixture(scope="module")
def undisturbed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index") / "index"
    build_index.run(config(keys, root), World())
    return root


def test_every_key_is_in_the_shard_of_its_unit(undisturbed: Path) -> None:
    index = open_index(undisturbed)
    assert index.num_vectors == NUM_KEYS and index.manifest.num_shards == 3
    for number, path in enumerate(index.shard_paths):
        shard = faiss.read_index(str(path))
        units = np.arange(NUM_KEYS) // 96 % 3 == number
        ids = [
            faiss.rev_swig_ptr(shard.invlists.get_ids(lst), shard.invlists.list_size(lst)).tolist()
            for lst in range(8)
        ]
        assert sorted(sum(ids, [])) == np.flatnonzero(units).tolist()
        assert index.manifest.shards[number].num_vectors == shard.ntotal == units.sum()
    assert faiss.read_index(str(index.trained_path)).ntotal == 0


def test_stock_faiss_finds_the_key_itself(keys: Path, tmp_path: Path) -> None:
    build_index.run(config(keys, tmp_path / "index", factory="IVF8,Flat", num_shards=1), World())
    stock = faiss.read_index(str(open_index(tmp_path / "index").shard_paths[0]))
    stock.nprobe = 8
    distances, ids = stock.search(vectors().astype(np.float32), 1)
    assert (distances == 0).all() and (vectors()[ids[:, 0]] == vectors()).all()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_give_the_same_files(keys: Path, undisturbed: Path, tmp_path: Path, size: int) -> None:
    for rank in range(size):  # the owner of `trained` first, so that nobody waits
        build_index.run(config(keys, tmp_path / "index"), World(rank=rank, size=size))
    assert result_of(tmp_path / "index") == result_of(undisturbed)


@pytest.mark.parametrize(("how", "size"), [("torch", 2), ("torch", 3), ("torch", 8), ("files", 3)])
def test_ranks_that_train_together_give_the_same_files(
    keys: Path, undisturbed: Path, forked_commands: Path, tmp_path: Path, how: str, size: int
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    words = [forked_commands / "python", FORKED_INDEX, keys, tmp_path / "index", how, str(size)]
    environment = environment_without_launchers() | place
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FORKED_INDEX.parents[3])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "index") == result_of(undisturbed)


def test_ranks_of_mpirun_train_together(
    keys: Path, undisturbed: Path, forked_commands: Path, tmp_path: Path
) -> None:
    mpirun = Path(sys.executable).parent / "mpirun"
    if not mpirun.is_file() or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpirun or mpi4py is not installed")
    root = FORKED_INDEX.parents[3]
    words = [
        mpirun,
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "2",
        forked_commands / "python",
        "tools/build_index.py",
    ]
    flags = ["--keys", keys, "--output", tmp_path / "index", "--factory", "IVF8,PQ4", "--num-shards", "3"]
    done = subprocess.run(
        [*words, *flags, "--exchange", "mpi"],
        cwd=root,
        env=environment_without_launchers() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "index") == result_of(undisturbed)


def test_ranks_without_a_shard_are_told(
    keys: Path, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed, tmp_path / "index")
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        build_index.run(config(keys, tmp_path / "index"), World(rank=0, size=64))
    assert "so that " in caplog.text and "--num-shards 64 (another --output)" in caplog.text


def test_threads_and_rerun_give_the_same_files(keys: Path, undisturbed: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    for _ in range(2):
        build_index.run(config(keys, tmp_path / "index", threads=2), World())
    torch.set_num_threads(threads[0])
    faiss.omp_set_num_threads(threads[1])
    assert result_of(tmp_path / "index") == result_of(undisturbed)


@pytest.mark.parametrize("damaged", ["trained.faissindex", "shard-1.faissindex"])
def test_damage_is_repaired(keys: Path, undisturbed: Path, tmp_path: Path, damaged: str) -> None:
    root = tmp_path / "index"
    build_index.run(config(keys, root), World())
    content = bytearray((root / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (root / damaged).write_bytes(content)
    untouched = (root / "shard-0.faissindex").stat().st_mtime_ns
    build_index.run(config(keys, root), World())
    assert result_of(root) == result_of(undisturbed)
    assert (root / "shard-0.faissindex").stat().st_mtime_ns == untouched


@pytest.mark.parametrize(("ranks", "kills"), [(2, 6)])
def test_runs_killed_at_random_leave_the_bytes_of_an_undisturbed_one(
    keys: Path,
    undisturbed: Path,
    tmp_path: Path,
    killed_runs: Callable[..., int],
    ranks: int,
    kills: int,
) -> None:
    root = tmp_path / "index"
    assert killed_runs(build_index.run, config(keys, root), ranks=ranks, kills=kills, seed=ranks) == kills
    assert result_of(root) == result_of(undisturbed)


def test_automatic_factory_is_kept_on_a_machine_with_other_memory(
    make_keys: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that is continued elsewhere must not become another run."""
    many = np.tile(vectors(), (10, 1))
    keys = make_keys(tmp_path / "keys", many, np.zeros(len(many), int), unit_positions=4096)
    monkeypatch.setattr(build_index, "host_bytes", lambda: 10_000)  # little
    automatic = config(keys, tmp_path / "index", factory="auto")
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        build_index.run(automatic, World())
    assert open_index(tmp_path / "index").factory == "IVF32,PQ1"
    assert (
        "would fill more than half" in caplog.text
        and "to train on" in caplog.text
        and "GB on disk" in caplog.text
    )
    monkeypatch.undo()
    caplog.clear()
    with caplog.at_level("INFO", logger="mlpmem_ds"):
        build_index.run(automatic, World())
    assert open_index(tmp_path / "index").factory == "IVF32,PQ1"
    assert "when this run was first started" in caplog.text


def test_a_damaged_identity_of_an_automatic_factory_is_written_anew(keys_dir: Path, tmp_path: Path) -> None:
    automatic = config(keys_dir, tmp_path / "index", factory="auto")
    build_index.run(automatic, World())
    path = automatic.output / "identity.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    build_index.run(automatic, World())
    assert path.read_bytes() == whole


def test_automatic_factory_of_a_tiny_corpus(make_keys: Callable[..., Path], tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", vectors()[:300], np.zeros(300, int))
    build_index.run(config(keys, tmp_path / "index", factory="auto"), World())
    index = open_index(tmp_path / "index")
    assert index.factory == "IVF1,Flat" and index.config["factory"] == "IVF1,Flat"


def test_raw_keys(make_keys: Callable[..., Path], tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", vectors(np.float16) / 7, np.zeros(NUM_KEYS, int), scale=1)
    for name in ("one", "two"):
        build_index.run(config(keys, tmp_path / name), World())
    assert result_of(tmp_path / "one") == result_of(tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factory": "Flat"}, "must hold IVF"),
        ({"factory": "IVF8,PQ5"}, "does not fit"),
        ({"factory": "IVF2048,Flat"}, "at least 2,048 keys"),
        ({"factory": "IVF99999999,Flat"}, "at least 99,999,999 keys"),
        ({"factory": "IVF0,Flat"}, "'IVF0,Flat' has no lists: choose one or more"),
        ({"num_shards": 100_000}, "--num-shards 100,000 are more than the .* keys of --keys"),
        ({"keys": Path("nowhere")}, "does not exist"),
    ],
)
def test_bad_inputs_leave_nothing(keys: Path, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_index.run(config(keys, tmp_path / "index", **changes), World())
    assert not (tmp_path / "index").exists()


def test_a_flipped_byte_of_the_keys_is_refused_and_then_continued(
    keys: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(keys, tmp_path / "keys")
    path = sorted((tmp_path / "keys").glob("keys-*.npy"))[-1]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    settings = config(tmp_path / "keys", tmp_path / "index")
    with pytest.raises(
        DamagedDataError, match=f"{path.name} does not have the checksum.*run the stage that made"
    ):
        build_index.run(settings, World())
    path.write_bytes(good)
    build_index.run(settings, World())
    assert result_of(tmp_path / "index") == result_of(undisturbed)


def test_bad_flags_and_other_runs(keys: Path, undisturbed: Path) -> None:
    for changes, words in (
        ({"num_shards": 0}, "--num-shards must be at least 1, not 0"),
        ({"threads": -1}, "--threads must be at least 1 and at most 1024, not -1"),
    ):
        with pytest.raises(UserError, match=words):
            config(keys, undisturbed, **changes)
    before = result_of(undisturbed)
    with pytest.raises(UserError, match="already holds another run"):
        build_index.run(config(keys, undisturbed, factory="IVF4,Flat"), World())
    assert result_of(undisturbed) == before


@pytest.mark.parametrize("coarse", ["IVF8", "IVF8_HNSW4"])
def test_lists_without_codes_are_those_of_one_with_them(keys: Path, tmp_path: Path, coarse: str) -> None:
    """From two ranks as from one, and the estimate of their size holds."""
    build_index.run(config(keys, tmp_path / "codes", factory=f"{coarse},Flat"), World())
    for rank in range(2):
        build_index.run(config(keys, tmp_path / "two", factory=coarse), World(rank=rank, size=2))
    build_index.run(config(keys, tmp_path / "one", factory=coarse), World())
    with_codes, lists = open_index(tmp_path / "codes"), open_index(tmp_path / "one")
    assert with_codes.has_codes and not lists.has_codes and lists.num_vectors == NUM_KEYS
    for shard, path in enumerate(lists.shard_paths):
        assert path.read_bytes() == open_index(tmp_path / "two").shard_paths[shard].read_bytes()
        found, expected = map_lists(lists, shard), map_lists(with_codes, shard)
        assert np.array_equal(found.list_sizes(), expected.list_sizes())
        for number in range(8):
            assert np.array_equal(found.ids_of_list(number), np.sort(expected.ids_of_list(number)))
    stored = sum(path.stat().st_size for path in (lists.trained_path, *lists.shard_paths))
    assert index_bytes(coarse, DIM, NUM_KEYS, 3) == pytest.approx(stored, rel=0.25)  # headers of small files

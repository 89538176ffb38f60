"""Groups of lists with an owner each: every query finds what one rank would find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.formats import lists_directory as layout
from mlpmem_ds.formats.index_directory import open_index
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.maths.listed_keys import ListedKeys
from mlpmem_ds.maths.neighbours import MISSING, Exclusion, PackedNeighbours
from mlpmem_ds.stages.index import build_index
from mlpmem_ds.stages.retrieval import list_owners
from mlpmem_ds.stages.retrieval.list_owners import (
    ListOwners,
    balanced_stops,
    merge_answers,
    positions_of_a_call,
)
from mlpmem_ds.stages.retrieval.list_search import ListSearch
from mlpmem_ds.stages.retrieval.neighbour_search import open_search

from ...thread_ranks import on_thread_ranks

NUM_KEYS, DIM = 403, 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["int8", "float16"])
def search(
    request: pytest.FixtureRequest,
    make_keys: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], ListSearch]:
    """Opens searches of lists in runs of 150 positions."""
    vectors = np.random.default_rng(0).integers(-6, 7, size=(NUM_KEYS, DIM)).astype(request.param)
    root = tmp_path_factory.mktemp("search")
    keys = open_keys(make_keys(root / "keys", vectors, np.arange(NUM_KEYS) % 40, unit_positions=96))
    build = build_index.Config(keys=root / "keys", output=root / "index", factory="IVF7", num_shards=2)
    build_index.run(build, World())
    index = open_index(root / "index")

    def opened() -> ListSearch:
        found = open_search(keys, index, how="lists", nprobe=3, lists=root / "lists")
        assert isinstance(found, ListSearch)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "RUN_POSITIONS", 150)
        opened().prepare()
    return opened


def exclusions(rows: np.ndarray) -> list[Exclusion | None]:
    first, stop = rows // 50 * 50, rows // 50 * 50 + 50
    return [
        None,
        Exclusion(query_ids_Q=rows),
        Exclusion(query_ids_Q=rows, window=3, first_hidden_Q=first, stop_hidden_Q=stop),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("is_resident", [True, False])
def test_all_ranks_find_what_one_finds(
    search: Callable[[], ListSearch],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    kind: int,
    is_resident: bool,
) -> None:
    monkeypatch.setattr(layout, "RUN_POSITIONS", 150)
    monkeypatch.setattr(list_owners, "_MERGED_ROWS", 16)
    monkeypatch.setattr(list_owners, "free_host_bytes", lambda: 1 << 40 if is_resident else 0)
    alone = search()
    alone.prepare()
    rows = np.random.default_rng(1).permutation(NUM_KEYS)
    shares = np.array_split(rows, size)
    shares[size // 2] = shares[size // 2][:0] if size > 1 else shares[0]  # a rank that asks nothing
    keys_ND, searches = alone._keys_ND, [search() for _ in range(size)]
    for one in searches:
        one.prepare_together()  # in turn: ranks of one process share names of temporary files

    def work(ranks: Any) -> list[PackedNeighbours]:
        owners = ListOwners(searches[ranks.rank], ranks)
        share = shares[ranks.rank]
        found = [owners.search(keys_ND[part], 20, exclusions(part)[kind]) for part in (share[:5], share[5:])]
        group = owners._group
        assert group is not None and owners.num_calls == 2
        assert len(group.runs) == (1 if is_resident or not group.num_lists else 3)
        return found

    for share, (first, rest) in zip(shares, on_thread_ranks(size, work), strict=True):
        if not len(share):
            assert first.packed_QK.shape == (0, 20)
            continue
        expected = alone.search(keys_ND[share], 20, exclusions(share)[kind])
        packed_QK = np.concatenate([first.packed_QK, rest.packed_QK])
        assert (first.id_bits, first.is_integer) == (expected.id_bits, expected.is_integer)
        assert np.array_equal(packed_QK, expected.packed_QK)


@pytest.fixture
def search_on_gpu(
    search: Callable[[], ListSearch], monkeypatch: pytest.MonkeyPatch
) -> tuple[ListSearch, int]:
    """As on a GPU, of lists in several runs, and the bytes that a group of all lists takes."""
    monkeypatch.setattr(layout, "RUN_POSITIONS", 150)
    found = search()
    found.prepare()
    assert found.mapped is not None
    found.device = torch.device("cuda", 0)
    return found, found.mapped.keys.num_bytes + 12 * NUM_KEYS


def test_ranks_that_share_a_gpu_share_its_memory(
    search_on_gpu: tuple[ListSearch, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ranks of a machine with one GPU: each would find room for its own group, and not for all."""
    found, needed = search_on_gpu
    monkeypatch.setattr(list_owners, "memory_bytes", lambda device: 2 * needed)
    monkeypatch.setattr(list_owners, "free_host_bytes", lambda: 1 << 40)
    monkeypatch.setattr(list_owners, "identity_of", lambda device: "GPU-1")
    monkeypatch.setattr(ListedKeys, "group", lambda self, first, stop, device=CPU: device)
    for other, expected in (("GPU-2", found.device), ("GPU-1", CPU)):
        ranks: Any = SimpleNamespace(rank=0, size=2, gather=lambda own, other=other: [own, (own[0], other)])
        assert ListOwners(found, ranks)._take(0, 7) == expected


@pytest.mark.parametrize(
    ("local_size", "visible", "gpu_holds", "host_holds", "expected"),
    [
        (8, 8, 0, 2, "part"),  # of the host's memory each has a quarter of what all lists take
        (None, 8, 0, 2, "part"),
        (8, 8, 0, 16, "cpu"),
        (1, 1, 0, 2, "cpu"),  # the other ranks are on other hosts
        (8, 8, 2, 0, "cuda"),
        (8, 4, 2, 0, "part"),  # two ranks a GPU
        (8, 1, 2, 0, "cuda"),  # the launcher shows each its own
    ],
)
def test_ranks_without_an_exchange_leave_each_other_room(
    search_on_gpu: tuple[ListSearch, int],
    monkeypatch: pytest.MonkeyPatch,
    local_size: int | None,
    visible: int,
    gpu_holds: int,
    host_holds: int,
    expected: str,
) -> None:
    """Each holds all lists, and all measure the same free memory at once."""
    found, needed = search_on_gpu
    found.world = World(size=8, local_size=local_size)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(list_owners, "memory_bytes", lambda device: gpu_holds * needed)
    monkeypatch.setattr(list_owners, "free_host_bytes", lambda: host_holds * needed)
    monkeypatch.setattr(ListedKeys, "group", lambda self, first, stop, device=CPU: device.type)
    taken: Any = ListOwners(found, Alone())._take(0, 7)
    assert ("part" if isinstance(taken, ListedKeys) else taken) == expected


def test_groups_have_about_as_many_keys_each_and_every_list_one_owner() -> None:
    generator = np.random.default_rng(0)
    for num_lists, num_groups in [(1, 1), (7, 3), (1000, 32), (5, 8), (64, 64)]:
        sizes = generator.integers(0, 200, num_lists)
        stops = balanced_stops(sizes, num_groups)
        assert len(stops) == num_groups and stops[-1] == num_lists and (np.diff(stops, prepend=0) >= 0).all()
        counts = np.add.reduceat(np.append(sizes, 0), np.append(0, stops[:-1])) * (
            np.diff(stops, prepend=0) > 0
        )
        assert counts.sum() == sizes.sum()
        assert counts.max() <= sizes.sum() / num_groups + 2 * sizes.max()


def test_answers_are_merged_like_one_sorted_row() -> None:
    generator = np.random.default_rng(0)
    num_queries, k = 50, 6
    values = generator.permutation(1 << 14)[: num_queries * 4 * k].reshape(4, num_queries, k)
    values.sort(axis=2)
    values[:, :, 4:][generator.random((4, num_queries, 2)) < 0.5] = MISSING
    values.sort(axis=2)
    rows = [np.flatnonzero(generator.random(num_queries) < 0.6) for _ in range(4)]
    expected = np.full((num_queries, 5 * k), MISSING)
    for owner, chosen in enumerate(rows):
        expected[chosen, owner * k : (owner + 1) * k] = values[owner, chosen]
    expected.sort(axis=1)
    found = merge_answers([values[owner, chosen] for owner, chosen in enumerate(rows)], rows, num_queries, k)
    assert np.array_equal(found, expected[:, :k])


@pytest.mark.parametrize(("ranks", "expected"), [(2, 1 << 17), (32, 8192), (256, 1024)])
def test_a_call_has_many_queries_and_bounded_memory(ranks: int, expected: int) -> None:
    k, nprobe = 1024, 32
    positions = positions_of_a_call(ranks, k, nprobe, block_size=512)
    assert positions == expected and positions * ranks == 1 << 18
    assert 8 * k * positions * (ranks + min(ranks, nprobe)) <= 1 << 32
    assert positions_of_a_call(ranks, 1 << 16, nprobe, 512) == 512 * max(
        1, (1 << 32) // (8 << 16) // (ranks + min(ranks, nprobe)) // 512
    )

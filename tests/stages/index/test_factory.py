"""Which factory is chosen, and which ones are refused."""

from __future__ import annotations

import pytest

from mlpmem_ds.stages.index.factory import (
    choose_factory,
    choose_num_shards,
    index_bytes,
    make_index,
    resolve_factory,
)

NUM_VECTORS, DIM = 700, 12


@pytest.mark.parametrize(
    ("num_vectors", "dim", "factory"),
    [
        (350_000, 256, "IVF1024,PQ64"),
        (10**6, 256, "IVF4096,PQ64"),
        (10**7, 256, "IVF16384,PQ64"),
        (5000, 16, "IVF16,PQ4x4"),
        (20_000, 30, "IVF64,PQ6"),
        (20_000, 7, "IVF64,PQ1"),
        (20_000, 23, "IVF64,PQ23"),
        (20_000, 22, "IVF64,PQ2"),
        (10**6, 254, "IVF4096,PQ127"),
        (10**6, 202, "IVF4096,PQ101"),
        (5000, 254, "IVF16,PQ127x4"),
        (300, 16, "IVF1,Flat"),
        (1, 3, "IVF1,Flat"),
    ],
)
def test_automatic_factory(num_vectors: int, dim: int, factory: str) -> None:
    assert choose_factory(num_vectors, dim)[0] == factory
    assert make_index(factory, dim, num_vectors).num_lists >= 1
    num_lists = int(factory[3:].split(",")[0])
    assert num_lists == 1 or num_vectors / num_lists >= 39


def test_a_code_has_a_byte_for_16_dimensions_at_least() -> None:
    for dim in range(1, 600):
        factory, reason = choose_factory(10**5, dim)
        parts = int(factory.rpartition("PQ")[2])
        assert dim % parts == 0 and dim / 16 <= parts <= dim
        assert (parts > max(1, dim // 4)) == ("no divisor" in reason)
    assert reason.endswith("8 bits for each 1 of 599 dimensions, which has no divisor from 38 to 149")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("IVF16,PQ5", "does not fit vectors of 12"),
        ("nonsense", "does not fit"),
        ("Flat", "must hold IVF"),
        ("IVF1024,Flat", "at least 1,024 keys"),
        ("IVF4,PQ4", None),
        ("IVF4,PQ4x10", "at least 1,024 keys"),
    ],
)
def test_factories_are_checked(factory: str, words: str | None) -> None:
    if words is None:
        assert make_index(factory, DIM, NUM_VECTORS).num_lists == 4
    else:
        with pytest.raises(ValueError, match=words):
            make_index(factory, DIM, NUM_VECTORS)


@pytest.mark.parametrize(
    ("memory_bytes", "factory", "words"),
    [
        (None, "IVF16384,PQ64", "8 bits for each 4"),
        (10**9, "IVF16384,PQ32", "more than half of 1.0 GB"),
        (1, "IVF16384,PQ16", "half"),
    ],
)
def test_automatic_factory_in_little_memory(memory_bytes: int | None, factory: str, words: str) -> None:
    found, reason = choose_factory(10**7, 256, memory_bytes)
    assert found == factory and words in reason


def test_lists_are_chosen_as_auto_does_but_without_the_code() -> None:
    assert resolve_factory("auto", 350_000, 256, None)[0] == "IVF1024,PQ64"
    factory, reason = resolve_factory("lists", 350_000, 256, None)
    assert factory == "IVF1024" and reason.endswith("without codes")
    assert resolve_factory("lists", 300, 16, None)[0] == "IVF1"
    assert resolve_factory("IVF64_HNSW8", 350_000, 256, None) == ("IVF64_HNSW8", "as asked")
    for name in ("IVF64", "IVF64_HNSW8", "OPQ4,IVF64"):
        assert make_index(name, 16, 9000).num_lists == 64
    bytes_with, bytes_without = (index_bytes(name, 256, 10**6, 4) for name in ("IVF1024,PQ64", "IVF1024"))
    assert bytes_without < 6 * 10**6 < 72 * 10**6 < bytes_with


def test_the_number_of_shards_depends_on_keys_and_lists_alone() -> None:
    """Four while they are small; then the centroids that each file repeats stay a tenth of it."""
    assert choose_num_shards(1003, 8) == choose_num_shards(4_000_000, 64) == 4
    assert choose_num_shards(10**8, 32_768) == 24
    assert choose_num_shards(5 * 10**9, 262_144) == 150
    assert choose_num_shards(2 * 10**11, 2_097_152) == 746

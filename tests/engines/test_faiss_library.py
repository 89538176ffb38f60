"""The faiss that is installed: without one a message; one with GPUs clusters floats on this rank's."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import faiss_library
from mlpmem_ds.engines.faiss import Index

GPU = torch.device("cuda", 3)


class FakeGpus:
    """The face of faiss-gpu over the CPU: which GPU each index was made for, and how many resources."""

    def __init__(self) -> None:
        self.devices: list[int] = []
        self.num_resources = 0

    def config(self) -> Any:
        return type("Config", (), {"device": 0})()

    def resources(self) -> str:
        self.num_resources += 1
        return "resources"

    def index(self, resources: str, dim: int, config: Any) -> Any:
        assert resources == "resources"
        self.devices.append(config.device)
        return faiss.IndexFlatL2(dim)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = FakeGpus()
    monkeypatch.setattr(faiss, "StandardGpuResources", fake.resources, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatConfig", fake.config, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexFlatL2", fake.index, raising=False)
    faiss_library._resources.cache_clear()
    yield fake
    faiss_library._resources.cache_clear()


def floats() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)


@pytest.mark.parametrize("above", [100, 8])
def test_floats_are_clustered_on_this_ranks_gpu(gpus: FakeGpus, above: int) -> None:
    """Also in two levels; one set of resources a process, and the index that a CPU gives."""
    made = []
    for device in (torch.device("cpu"), GPU):
        index = Index.make("IVF16,Flat", 8)
        index._device = device  # the centroids' own device is not needed to train floats
        if device == GPU:
            index._quantizer._device = torch.device("cpu")
        index.train(floats(), seed=1, two_level_above=above)
        made.append(faiss.serialize_index(index.raw))
    assert np.array_equal(*made)
    assert set(gpus.devices) == {3} and gpus.num_resources == 1


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"),
    reason="needs a CUDA device and faiss-gpu",
)
def test_the_real_faiss_clusters_floats_on_a_gpu_as_well_as_on_a_cpu() -> None:
    """Other sums, so other last bits: the same distance of the vectors from their centroids."""
    vectors, errors = floats(), []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        centroids = faiss_library.cluster(vectors, 16, seed=1, iterations=10, device=device)
        distances = ((vectors[:, None] - centroids[None]) ** 2).sum(axis=2)
        errors.append(distances.min(axis=1).mean())
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_codes_are_clustered_without_faiss(gpus: FakeGpus) -> None:
    index = Index.make("IVF4,Flat", 8)
    index.train((floats() * 20).astype(np.int8), seed=1)
    assert not gpus.devices


def test_without_gpus_there_is_no_index_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    assert faiss_library.gpu_index(8, GPU) is None
    assert faiss_library.gpu_index(8, torch.device("cpu")) is None


def test_a_missing_faiss_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # its import fails
    monkeypatch.delitem(sys.modules, faiss_library.__name__)
    with pytest.raises(UserError, match=r"pip install '.\[cpu\]' .* pip install '.\[gpu\]'"):
        importlib.import_module(faiss_library.__name__)


@pytest.mark.gpu
def test_a_real_gpu_clusters_as_well_as_the_cpu() -> None:
    if not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("needs a CUDA device and faiss-gpu")
    vectors = np.random.default_rng(0).normal(size=(100_000, 64)).astype(np.float32)
    errors = []
    for device in (torch.device("cpu"), torch.device("cuda", torch.cuda.device_count() - 1)):
        centroids = faiss_library.cluster(vectors, 256, seed=1, iterations=10, device=device)
        nearest = faiss.IndexFlatL2(64)
        nearest.add(centroids)
        errors.append(nearest.search(vectors, 1)[0].mean())
    assert abs(errors[1] / errors[0] - 1) < 0.01

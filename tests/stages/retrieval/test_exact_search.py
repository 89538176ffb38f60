"""Exact search puts the keys on the device it is given, once, whichever threads share it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.maths.knn import exact_neighbours
from mlpmem_ds.maths.knn_on_device import HostKeys, load_keys
from mlpmem_ds.stages.retrieval import exact_search
from mlpmem_ds.stages.retrieval.exact_search import ExactSearch


def test_threads_share_one_copy_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(-9, 10, (3000, 8)).astype(np.int8)
    devices = []

    def load(keys_ND: Any, device: torch.device) -> Any:
        devices.append(device)
        return load_keys(keys_ND, torch.device("cpu"))

    monkeypatch.setattr(exact_search, "load_keys", load)
    search = ExactSearch(keys, torch.device("cuda:3"))
    starts = range(0, 800, 100)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: search.search(keys[start : start + 100], 20).unpack(), starts))
    assert devices == [torch.device("cuda:3")]
    expected = exact_neighbours(keys[:800], keys, 20, exclusion=None)
    np.testing.assert_array_equal(np.concatenate([part.ids_QK for part in found]), expected.ids_QK)


def test_on_a_cpu_keys_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_search, "load_keys", None)
    keys = np.zeros((5, 3), np.int8)
    assert ExactSearch(keys).search(keys, 2).packed_QK.shape == (5, 2)


def test_keys_that_do_not_fit_on_the_gpu_are_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        exact_search, "load_keys", lambda keys_ND, _: HostKeys(keys_ND=keys_ND, device=torch.device("cpu"))
    )
    search = ExactSearch(np.zeros((5, 3), np.int8), torch.device("cuda:3"))
    with caplog.at_level("WARNING", logger="mlpmem_ds"):
        for _ in range(2):
            search.search(np.zeros((2, 3), np.int8), 2)
    assert caplog.text.count("do not fit in half of what is free on cuda:3") == 1

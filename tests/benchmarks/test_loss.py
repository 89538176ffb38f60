"""What the loss's benchmark has beside the arms of test_bench.py: oneDNN's arm, the rows of a GPU at toy
sizes."""

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def tools(monkeypatch):
    return importlib.import_module


def test_the_timed_arms_compute_what_they_say(tools):
    loss = tools("mlpmem_ds.benchmarks.loss")
    sizes = {
        "rows": 37,
        "width": 24,
        "vocab_size": 301,
        "entries": 7,
        "chunk_bytes": 4 * 301 * 5,
        "torch_chunk_rows": 16,
    }
    config = loss.Config(output=Path("unused"), **sizes)
    problem = loss.make_problem(config)
    arms = loss.timed_arms()
    assert set(loss.ARMS) < set(arms)
    before = torch.backends.mkldnn.matmul.fp32_precision
    if "torch_lce_onednn" in arms:
        for found, wanted in zip(
            arms["torch_lce_onednn"](problem, config), loss.torch_lce(problem, config), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    for found, wanted in zip(loss.ours_bfloat16(problem, config), loss.ours(problem, config), strict=True):
        assert (found.float() - wanted).norm() <= 1e-2 * wanted.norm()
    assert loss.ours_bfloat16(problem, config)[1].dtype == torch.bfloat16
    joined, plain = loss.ours_joined(problem, config), loss.ours(problem, config)
    assert all(part.isfinite().all() for part in joined) and joined[0] != plain[0]
    logits = problem.hidden_ND @ problem.weight_VD.t()
    _, d_hidden, d_weight = loss.products(problem, config)
    torch.testing.assert_close(d_hidden, logits @ problem.weight_VD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d_weight, logits.t() @ problem.hidden_ND, rtol=1e-4, atol=1e-4)


def test_rows_of_a_gpu(tools):
    gpu = tools("mlpmem_ds.benchmarks.loss_gpu")
    sizes = gpu.Sizes(rows=16, width=8, vocab_size=64, entries=4, mixture_batch=3, mixture_vocab_size=20)
    rows, ratios = gpu.gpu_rows("cpu", runs=2, sizes=sizes)
    assert {row.arm for row in rows} == {"gpu_loss", "gpu_matmuls", "gpu_mixture", "gpu_mixture_eager"}
    assert all(row.runs == 2 and row.min > 0 and row.unit == "s" for row in rows)
    assert set(ratios) == {"gpu_loss_over_matmuls", "gpu_mixture_over_eager"}
    arms = gpu._mixture_arms("cpu", sizes)
    torch.testing.assert_close(arms["gpu_mixture"](), arms["gpu_mixture_eager"](), rtol=0, atol=1e-5)

"""Benchmark `decode` at tiny sizes: each arm generates what its definition says, and the JSON holds what is
promised."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World

SIZES: dict[str, Any] = {
    "layers": 2,
    "width": 64,
    "vocab_size": 97,
    "memory_blocks": 1,
    "prompt_tokens": 6,
    "new_tokens": 4,
    "batch_sizes": (1, 2),
    "datastore_sizes": (200, 400, 900),
    "key_size": 16,
    "k": 8,
    "factory": "IVF4,PQ4x4",
    "nprobe": 4,
    "passages": 11,
    "passage_tokens": 3,
    "runs": 1,
}


@pytest.fixture
def bench() -> Any:
    return importlib.import_module("mlpmem_ds.benchmarks.decode")


def test_each_arm_generates_what_its_definition_says(bench: Any) -> None:
    config = bench.Config(output=Path("unused"), **SIZES)
    setting = bench.prepare(config)
    for parameter in (*setting.base.parameters(), *setting.joint.memory.parameters()):
        parameter += 0.2 * torch.randn(parameter.shape)
    setting.joint.memory.head.weight.mul_(
        6
    )  # sure of itself, so that the mixture chooses other tokens than the base
    arms = bench.make_arms(config, setting)
    assert set(arms) == {"base", "base_memory", "base_memory_int8", "rag"} | {
        f"knn_{kind}_{size}" for kind in ("exact", "ivfpq") for size in SIZES["datastore_sizes"]
    }
    prompts = bench.prompts_of(config, 2)
    found = {}
    for name, arm in arms.items():
        found[name], moments = arm(2)
        assert len(moments) == 1 + config.new_tokens and moments == sorted(moments)
    assert torch.equal(found["base"][:, :6], prompts) and found["rag"].shape == (2, 15 + 6 + 4)
    assert torch.equal(found["rag"][:, 15:21], prompts)
    assert not torch.equal(found["base"], found["base_memory"])
    assert not torch.equal(found["base"], found["knn_exact_900"])

    # The last token of the kNN arm from its definition, in float64 and by brute force.
    tokens = found["knn_exact_900"]
    caught: list[torch.Tensor] = []
    handle = setting.base.model.layers[-1].mlp.register_forward_pre_hook(
        lambda _, args: caught.append(args[0][:, -1])
    )
    base_BV = setting.base(tokens[:, :-1]).logits[:, -1].double().softmax(-1).numpy()
    handle.remove()
    queries = (caught[0] @ setting.projection_DE).clamp(-127, 127).round().numpy().astype(np.int64)
    for row, query in enumerate(queries):
        distances = ((setting.keys_NE.astype(np.int64) - query) ** 2).sum(1)
        nearest = np.lexsort((np.arange(900), distances))[: config.k]
        weights = np.exp(-(distances[nearest] - distances[nearest].min()) / bench._TEMPERATURE)
        knn_V = np.bincount(setting.values_N[nearest], weights=weights / weights.sum(), minlength=97)
        assert tokens[row, -1] == ((1 - bench._LAMBDA) * base_BV[row] + bench._LAMBDA * knn_V).argmax()


def test_report(bench: Any, tmp_path: Path) -> None:
    bench.run(bench.Config(output=tmp_path / "decode.json", **SIZES), World())
    report = json.loads((tmp_path / "decode.json").read_text())
    assert report["name"] == "decode"
    assert {
        "overhead_batch1",
        "overhead_batch2",
        "overhead_over_bytes_ratio",
        "bytes_ratio",
        "overhead_int8_batch1",
    } <= set(report["ratios"])
    assert all(np.isfinite(value) and value > 0 for value in report["ratios"].values())
    rows = {(row["arm"], row["metric"]): row["median"] for row in report["rows"]}
    for batch in (1, 2):
        step = rows["knn_ivfpq_400", f"seconds_per_step_batch{batch}"]
        assert rows["knn_ivfpq_400", f"tokens_per_second_batch{batch}"] == pytest.approx(batch / step)
    # 2 layers of 4 attention and 3 MLP matrices, the tied embedding, the norms; and one block, a head, the
    # norms.
    hidden, inner = 64, 128
    base = 2 * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + 97 * hidden + hidden
    memory = 3 * hidden * inner + hidden + 97 * hidden + hidden
    assert rows["base", "bytes_read"] == 4 * base
    assert report["ratios"]["bytes_ratio"] == pytest.approx(1 + memory / base)
    # A byte a weight; 4 + 2 bytes for the scale of each of a block's 2 · inner + hidden rows and the head's;
    # the norms.
    small = 3 * hidden * inner + 97 * hidden + 6 * (2 * inner + hidden + 97) + 4 * 2 * hidden
    assert report["ratios"]["bytes_ratio_int8"] == pytest.approx(1 + small / (4 * base))


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"new_tokens": 1}, "--new-tokens must be at least 2, not 1"),
        ({"width": 100}, "multiple of 64"),
        ({"batch_sizes": (2,)}, "must hold 1"),
        ({"k": 300}, "at least --k 300"),
        ({"layers": 0}, "--layers must be at least 1, not 0"),
        ({"threads": -1}, "--threads must be at least 1 and at most 1024, not -1"),
    ],
)
def test_wrong_sizes(bench: Any, changes: dict[str, Any], needle: str) -> None:
    with pytest.raises(UserError, match=needle):
        bench.Config(output=Path("unused"), **{**SIZES, **changes})

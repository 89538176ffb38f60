"""Benchmark `train`: every arm takes the same step, and the JSON is what the registry promises."""

import importlib
import json

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World

pytestmark = pytest.mark.usefixtures("process_group")
SIZES = {"rows": 24, "width": 16, "num_blocks": 2, "entries": 5}


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("mlpmem_ds.benchmarks.train")


def test_every_arm_takes_the_same_step(bench, tmp_path):
    config = bench.Config(output=tmp_path / "out.json", **SIZES)
    batch = bench.make_batch(config, 40)
    assert torch.equal(bench.collate_row_by_row(batch, 40), bench.collate_at_once(batch, 40))
    steps = bench.make_steps(bench.memory_config(config, 40), batch, World())
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    for name, found in losses.items():
        tolerance = 2e-2 if name in ("ours", "published_bf16", "repaired_bf16") else 1e-4
        assert found == pytest.approx(losses["repaired"], rel=tolerance), name


def test_the_json_has_the_promised_ratios(bench, tmp_path):
    output = tmp_path / "out.json"
    bench.run(bench.Config(output=output, vocab_sizes=(40, 60), runs=1, **SIZES), World())
    record = json.loads(output.read_text())
    for vocab_size in (40, 60):
        for other in ("published", "repaired"):
            assert record["ratios"][f"speed_over_{other}_v{vocab_size}"] > 0
        assert 0 < record["ratios"][f"outside_matmul_share_v{vocab_size}"] < 1
        assert record["ratios"][f"bound_over_repaired_v{vocab_size}"] > 0
    assert (
        record["name"] == "train" and {"arm", "metric", "unit", "median", "runs"} <= record["rows"][0].keys()
    )


def test_wrong_sizes_are_refused(bench, tmp_path):
    for changes, said in (
        ({"rows": 0}, "--rows"),
        ({"entries": 50}, "do not fit"),
        ({"gpu_preset": "9b"}, "none of"),
    ):
        with pytest.raises(UserError, match=said):
            bench.Config(output=tmp_path / "out.json", **{"vocab_sizes": (40,), "entries": 5, **changes})

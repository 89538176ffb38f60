"""The table of a plan: a line a stage, and what a reader must know of the figures."""

from __future__ import annotations

import json
from pathlib import Path

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.planning import plan, table
from mlpmem_ds.stages.planning.cost_model import STAGES

from .conftest import CLUSTER, SHAPE, config


def test_table_and_json(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    found = plan.run(config(output=output), World())
    text = table.render_table(found)
    assert all(line[:9].strip() in text for line in STAGES) and "estimate" in text and "IVF32768,PQ64" in text
    written = json.loads(output.read_text())
    assert [stage["name"] for stage in written["stages"]] == list(STAGES)
    assert written["bytes"] == sum(stage["bytes"] for stage in written["stages"])
    assert (
        written["work"]["memory"]["vocab_size"] == SHAPE["vocab_size"] and written["format"] == "mlpmem-plan"
    )


def test_a_training_without_stored_inputs_says_what_the_base_costs() -> None:
    base = {"parameters": 8e9, "width": 4096, "vocab_size": 128_256, "preset": "1b"}
    base["batch_positions"] = 1 << 20
    stored, online = (
        plan.make_plan(config(**base, **CLUSTER, input_codec=codec)) for codec in ("bf16", "none")
    )
    assert "4.1 times the memory's own training" in table.render_table(online)
    assert "store no inputs" not in table.render_table(stored)


def test_a_price_has_a_column_where_one_is_given() -> None:
    sizes = {"gpus": 16, "ranks": 16, "memory_gb": 100.0}
    unsaid, priced = (plan.make_plan(config(**sizes, price_per_gpu_hour=price)) for price in (None, 2.5))
    assert "price" not in table.render_table(unsaid)
    assert "      price  figures" in table.render_table(priced)

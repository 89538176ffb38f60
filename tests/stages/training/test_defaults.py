"""Defaults that depend on the size of what is trained, and the warning about small batches."""

import logging
import re

import pytest

from mlpmem_ds.core.config import parse_config
from mlpmem_ds.core.world import World
from mlpmem_ds.models.memory_config import PRESETS, MemoryConfig
from mlpmem_ds.stages.planning import plan
from mlpmem_ds.stages.training import train
from mlpmem_ds.stages.training.defaults import default_learning_rate, warn_of_few_rows


def test_large_models_learn_at_a_lower_rate():
    of_the_demo = MemoryConfig(
        input_size=256, hidden_size=256, intermediate_size=1024, num_blocks=4, vocab_size=4096
    )
    assert default_learning_rate(of_the_demo.num_parameters()) == 2e-3
    assert default_learning_rate(100_000_000) == 2e-3 and default_learning_rate(100_000_001) == 3e-4
    assert {default_learning_rate(make(32_000).num_parameters()) for make in PRESETS.values()} == {3e-4}


@pytest.mark.parametrize(
    "rows, size, on_gpu, said",
    [
        (2048, 2, True, ""),
        (2048, 4, True, "takes 512 rows a step.* give --x 4096 or more"),
        (2048, 4, False, ""),
    ],
)
def test_a_gpu_with_few_rows_is_named(rows, size, on_gpu, said, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_few_rows(rows, World(rank=0, size=size), flag="--x", on_gpu=on_gpu)
    assert len(caplog.records) == bool(said) and re.search(said, caplog.text)


@pytest.mark.parametrize(
    "stage, words",
    [
        (train, "--ds_config x --corpus x --keys x --alpha 0 --output x"),
        (plan, "--positions 9 --width 8 --vocab-size 9"),
    ],
)
def test_the_presets_are_those_of_the_memory(stage, words, capsys):
    def parse(preset):
        return parse_config(stage.Config, [*words.split(), "--preset", preset], prog="tool")

    assert [parse(name).preset for name in PRESETS] == list(PRESETS)
    with pytest.raises(SystemExit) as caught:
        parse("9t")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and all(name in said for name in PRESETS)

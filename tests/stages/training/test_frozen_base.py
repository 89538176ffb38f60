"""The base next to a training runs as it ran in extract_keys, where it can."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.training import frozen_base


@pytest.mark.parametrize(
    ("gpus", "packages", "dtype", "attention", "warns"),
    [
        (8, ["flash_attn"], "bfloat16", "flash_attention_2", False),
        (8, [], "bfloat16", "auto", True),
        (0, ["flash_attn"], "float32", "auto", True),
    ],
)
def test_flash_attention_where_the_keys_were_extracted_with_it(
    gpus: int,
    packages: list[str],
    dtype: str,
    attention: str,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(frozen_base, "TransformersSource", lambda path, **given: opened.append(given))
    monkeypatch.setattr(frozen_base, "check_source_reads", lambda *_, **__: None)
    manifest = SimpleNamespace(dtype=dtype, attention="flash_attention_2", input_layers_path=None)
    inputs: Any = SimpleNamespace(
        keys=SimpleNamespace(manifest=manifest), needs_base=True, corpus=None, tuning=None
    )
    config: Any = SimpleNamespace(model="base", base_sharding="none", output=None)
    frozen_base.open_base(config, inputs, World(rank=11, size=16, local_rank=3))
    device = torch.device("cuda:3") if gpus else torch.device("cpu")
    assert opened == [{"dtype": dtype, "attention": attention, "device": device, "layers_path": None}]
    assert ("extracted with --attention flash_attention_2" in caplog.text) == warns

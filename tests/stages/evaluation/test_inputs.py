"""Where the base's layers are, for a base that extraction had to be told of."""

from __future__ import annotations

import json
from pathlib import Path

from mlpmem_ds.stages.evaluation.evaluate import Config
from mlpmem_ds.stages.evaluation.inputs import _layers_path


def test_the_layers_are_where_the_memory_or_the_keys_say(tmp_path: Path) -> None:
    def write(name: str, content: dict[str, object]) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))

    def found(**places: Path) -> str | None:
        return _layers_path(
            Config(model="m", corpus=tmp_path / "corpus", output=tmp_path / "report", **places)
        )

    write("memory/weights/config.json", {"provenance": {"input_layers_path": "a.layers"}})
    write("export/config.json", {"layers_path": "b.layers"})
    write("keys/manifest.json", {"layers_path": "c.layers"})
    write("plain/weights/config.json", {"provenance": {}})
    keys = tmp_path / "keys"
    assert found() is None
    assert found(memory=tmp_path / "memory", keys=keys) == "a.layers"
    assert found(memory=tmp_path / "export") == "b.layers"
    assert found(memory=tmp_path / "plain", keys=keys) is None
    assert found(keys=keys) == "c.layers"

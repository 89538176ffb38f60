"""Where the base's layers are, for a base that extraction had to be told of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlpmem_ds.core.typed_json import to_json
from mlpmem_ds.formats.trained_models import MemoryDescription
from mlpmem_ds.stages.evaluation.arms import knn
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.inputs import find_layers_path

from ...manifests import make_provenance


def test_the_layers_are_where_the_memory_or_the_keys_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, content: dict[str, object]) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))

    def found(**roots: Path) -> str | None:
        return find_layers_path(
            Config(model="m", corpus=tmp_path / "corpus", output=tmp_path / "report", **roots)
        )

    def write_memory(name: str, layers_path: str | None) -> None:
        provenance = make_provenance(input_layers_path=layers_path)
        write(f"{name}/weights/config.json", to_json(MemoryDescription(memory={}, provenance=provenance)))

    write_memory("memory", "a.layers")
    write("export/config.json", {"layers_path": "b.layers"})
    write("keys/manifest.json", {})
    told = SimpleNamespace(manifest=SimpleNamespace(layers_path="c.layers"))
    monkeypatch.setattr(knn, "open_keys", lambda root: told)
    write_memory("plain", None)
    keys = tmp_path / "keys"
    assert found() is None
    assert found(memory=(str(tmp_path / "memory"),), keys=keys) == "a.layers"
    assert found(memory=(str(tmp_path / "export"),)) == "b.layers"
    assert found(memory=(str(tmp_path / "plain"),), keys=keys) is None
    assert found(keys=keys) == "c.layers"

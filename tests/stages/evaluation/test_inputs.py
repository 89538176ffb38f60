"""Where the base's layers are, for a base that extraction had to be told of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mlpmem_ds.stages.evaluation.inputs import layers_path_of


def test_the_layers_are_where_the_memory_or_the_keys_say() -> None:
    def told(path: str | None) -> Any:
        return SimpleNamespace(layers_path=path)

    assert layers_path_of([], None) is None
    assert layers_path_of([told("a.layers"), told("b.layers")], told("c.layers")) == "a.layers"
    assert layers_path_of([told(None)], told("c.layers")) is None
    assert layers_path_of([], told("c.layers")) == "c.layers"

"""Part of `train`: sets of flags by name (`--recipe`).

A recipe changes defaults: a flag that is given next to it keeps its value, and what of a recipe was changed
is logged and stays in the memory's provenance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Flags by the names of their fields, and where they are from."""

    source: str
    flags: Mapping[str, Any]


RECIPES: Mapping[str, Recipe] = {
    "paper": Recipe(
        source="arXiv 2508.01832, the 1 B memory",
        flags={
            "objective": "imitation",
            "alpha": 0.4,
            "ce_through": "plain",
            "start": "random",
            "epochs": 5.0,
            "learning_rate": 4e-4,
            "schedule": "linear",
            "warmup_fraction": 0.03,
            "weight_decay": 0.0,
        },
    )
}


class HasFlags(Protocol):
    """A Config with the flag `--recipe`."""

    @property
    def recipe(self) -> str | None:
        """A name in `RECIPES`."""


def recipe_changes(config: HasFlags) -> dict[str, Any]:
    """Flag → its value, of those that are not as the recipe of `config` has them."""
    flags = {} if config.recipe is None else RECIPES[config.recipe].flags
    return {name: getattr(config, name) for name, value in flags.items() if getattr(config, name) != value}

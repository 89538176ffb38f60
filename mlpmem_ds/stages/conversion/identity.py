"""Part of `convert_checkpoint`: whether an export is the one that the flags ask for.

What an export is made from can be named in two runs by different knowledge: without the network a base of the
Hub has its weights, from the cache, and often no model card. So what the card says is compared only where it
was read both times. All else is: another base, tokenizer or setting is another export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlpmem_ds.core.files import canonical_json
from mlpmem_ds.engines.model_files import GENERATION_FILE
from mlpmem_ds.stages.conversion.inputs import BASE_CARD

_COMPARED = ("format", "version", "inputs", "config")


def differences_of(found: Any, identity: Mapping[str, Any]) -> list[str]:
    """What an identity that was stored has otherwise than this one, in words; none: it is the same export."""
    old, new = _compared(found), _compared(identity)
    if not (is_card_known(found) and is_card_known(identity)):
        for values in (old, new):
            values["config"] = _without_card(values["config"])
    differences = [
        f"{name} was {old[name]!r}, now {new[name]!r}" for name in _COMPARED if old[name] != new[name]
    ]
    if differences and _has_settings(found) != _has_settings(identity):
        differences.append(
            f"{GENERATION_FILE} of the base was found in one of the two runs alone: without the network a"
            " model of the Hub has only the files that are in its cache"
        )
    return differences


def is_card_known(identity: Any) -> bool:
    """Whether the base's model card was read, or did not matter."""
    config = identity.get("config") if isinstance(identity, Mapping) else None
    return not isinstance(config, Mapping) or config.get(BASE_CARD, {}) is not None


def _has_settings(identity: Any) -> bool:
    inputs = identity.get("inputs") if isinstance(identity, Mapping) else None
    return isinstance(inputs, Mapping) and "generation_config" in inputs


def _compared(identity: Any) -> dict[str, Any]:
    """As a reader of the file sees it."""
    values = identity if isinstance(identity, Mapping) else {}
    plain: dict[str, Any] = json.loads(canonical_json({name: values.get(name) for name in _COMPARED}))
    return plain


def _without_card(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {name: value for name, value in config.items() if name != BASE_CARD}

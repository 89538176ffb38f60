"""What is given as a model, where it is none that can be read: adapters, GGUF, encoders, code of its own.

The loader would find most of it out too, later and in other words.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def reason_against_path(name_or_path: str) -> str | None:
    """Why this names no model directory, and what to give instead; None where it has a `config.json`, or is
    a name that the Hub may know."""
    path = Path(name_or_path).expanduser()
    if not name_or_path.strip():
        return "it is empty (a variable that is not set?): give a directory or a Hub name"
    if path.is_file():
        if path.suffix == ".gguf":
            return "a GGUF file is llama.cpp's: tools/fetch_base.py --gguf makes a model directory of it"
        return "it is a file: give a directory with config.json and weights, as save_pretrained writes it"
    if not path.is_dir():
        return None
    if (path / "adapter_config.json").is_file():
        base = _values_of(path / "adapter_config.json").get("base_model_name_or_path", "its model")
        return (
            f"it is an adapter of {base}: load both with peft, join them (merge_and_unload()), write the"
            " result with save_pretrained, and give that"
        )
    if (path / "config.json").is_file():
        return None
    if any(path.glob("*.gguf")):
        return "GGUF files are llama.cpp's: tools/fetch_base.py --gguf makes a model directory of one"
    if (path / "modules.json").is_file():
        return "it is a sentence-transformers directory: give a causal language model"
    return "it is a directory without config.json: give one that save_pretrained wrote, or a Hub name"


def reason_against_config(path: Path) -> str | None:
    """Why the model of this `config.json` is no causal language model that transformers has a class for."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    content = path.read_bytes()
    if content.startswith(codecs.BOM_UTF8):
        return (
            "its config.json begins with a byte-order mark, which transformers does not read: save it as"
            " UTF-8 without one"
        )
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"its config.json is not JSON ({error}): download or save it again"
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(model_type, str):
        return "its config.json names no model_type: give a directory that save_pretrained wrote"
    if model_type not in CONFIG_MAPPING:
        if values.get("auto_map"):
            return (
                f"its model type {model_type} comes with code of its own (trust_remote_code), which is never"
                " run here: give a version of it that transformers has a class for, or read its states by an"
                " engine of your own (docs/state_sources.md)"
            )
        return (
            f"transformers {transformers.__version__} does not know its model type {model_type}: install a"
            " version that does"
        )
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"a model of type {model_type} is no causal language model: give one"
    return None


def _values_of(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}

"""A base whose matrices have 4 or 8 bits, by a library that transformers knows: the memories, a gate and the
output head stay as they are.

Place in the pipeline: `MemoryAugmentedLM.from_pretrained(…, quantization_config=…)` and `generate
--base-weights`. A base that is joined with its memories is quantized alone, as transformers does it; an
export holds all of them, and transformers would quantize all of it.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.
"""

import copy
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from .hf_config import MemoryAugmentedConfig

_KEPT = (r"memory\.", r"further_memories\.", r"gate\.")
"""patterns of names of modules"""
_LISTS = {
    "bitsandbytes": "llm_int8_skip_modules",
    "quanto": "modules_to_not_convert",
    "torchao": "modules_to_not_convert",
}
"""method → the field with the modules that it leaves alone"""
_ORIGIN = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""arguments of `from_pretrained` that say where a file comes from"""
_REMEDY = (
    "quantize the base alone and join it: MemoryAugmentedLM.from_pretrained(BASE, MEMORY,"
    " quantization_config=…), where MEMORY may be an export of one memory"
)


def bits_config(bits: int) -> BitsAndBytesConfig:
    """For bitsandbytes, with 4 or 8 bits. Raises ValueError where it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{bits}-bit weights need bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def arguments_of_load(name: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` of an export, such that a quantization config holds for its base
    alone.

    Raises:
        ValueError: this method cannot be told so.
    """
    given, config = arguments.get("quantization_config"), arguments.get("config")
    if given is None:
        return arguments
    if not isinstance(config, MemoryAugmentedConfig):  # a place, or none
        origin = {key: arguments[key] for key in _ORIGIN if key in arguments}
        config = MemoryAugmentedConfig.from_pretrained(config or name, **origin)
    return {**arguments, "quantization_config": for_the_base_alone(given, config)}


def for_the_base_alone(given: Any, config: MemoryAugmentedConfig) -> Any:
    """A copy of a quantization config that leaves alone all of a joint model but its base.

    Args:
        given: of transformers, such as `BitsAndBytesConfig`, or its dict.
        config: of the joint model.

    Raises:
        ValueError: this method cannot be told so.
    """
    if (name := _LISTS.get(method_of(given))) is None:
        raise ValueError(f"an export cannot be loaded with the quantization {method_of(given)}: {_REMEDY}")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config.base_config)
    result = copy.deepcopy(given)
    _leave_alone(result, name, base)
    return result


def _leave_alone(given: Any, name: str, base: PreTrainedModel) -> None:
    """Put into its list what is not quantized."""
    if isinstance(given, dict):
        given[name] = _extended(given.get(name), base)
    else:
        setattr(given, name, _extended(getattr(given, name), base))


def _extended(names: list[str] | None, base: PreTrainedModel) -> list[str]:
    """Names of modules that are left alone, for the base by itself and inside of a joint model."""
    if names is None:
        head = base.get_output_embeddings()
        names = [name for name, module in base.named_modules() if module is head]
    return list(dict.fromkeys([*names, *(f"base.{name}" for name in names), *_KEPT]))


def method_of(given: Any) -> str:
    """Name of a quantization method, of a config or of its dict."""
    if isinstance(given, dict):
        is_short = given.get("load_in_8bit") or given.get("load_in_4bit")  # which transformers takes, too
        method = given.get("quant_method") or ("bitsandbytes" if is_short else None)
    else:
        method = getattr(given, "quant_method", None)
    return str(getattr(method, "value", method))


def prepare_to_save(base: PreTrainedModel) -> None:
    """Note in the config of a quantized base what is not quantized of the joint model that holds it.

    Raises:
        ValueError: another library than bitsandbytes quantized it.
    """
    given = getattr(base.config, "quantization_config", None)
    if given is None:
        return
    if (method := method_of(given)) != "bitsandbytes":
        raise ValueError(
            f"a model whose base is quantized by {method} is not saved: save it with the float base, and"
            " quantize that when it is loaded"
        )
    _leave_alone(given, _LISTS[method], base)

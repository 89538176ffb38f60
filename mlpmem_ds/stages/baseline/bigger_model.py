"""Part of `train_baseline`: a model of the base's family, from scratch, of the size of base and memory.

Width and number of layers are chosen among those near the requested size: the shape that is most like the
base's (width over layers) wins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mlpmem_ds.core.errors import UserError

_TOLERANCE = 0.03  # of the size: within it the shape decides
_MULTIPLE = 8  # of the width inside the MLP
# What follows from other fields, and would be of the base's size.
_DERIVED = ("layer_types", "transformers_version", "architectures", "dtype", "torch_dtype", "head_dim")


def bigger_config(base: PretrainedConfig, num_parameters: int) -> PretrainedConfig:
    """The configuration of a model like `base` with nearly so many parameters, the embeddings included.

    Raises:
        UserError: the base has more, or its family cannot be scaled by its configuration.
    """
    try:
        shapes = list(_shapes_near(base, num_parameters))
    except Exception as error:  # each family's configuration checks itself in its own way
        raise UserError(
            f"--kind bigger: a {base.model_type} of other layers or width cannot be made from the base's"
            f" configuration ({error}): compare with --kind continued or lora"
        ) from error
    if not shapes:
        raise UserError(
            f"--kind bigger: {num_parameters:,} parameters are fewer than the base has with its own layers:"
            " give a number beyond the base's"
        )
    aspect = _aspect(base)

    def unlikeness(shape: tuple[PretrainedConfig, int]) -> tuple[float, float]:
        config, size = shape
        miss = abs(math.log(size / num_parameters))
        return max(miss, _TOLERANCE), abs(math.log(_aspect(config) / aspect))

    return min(shapes, key=unlikeness)[0]


def new_model(config: PretrainedConfig, *, seed: int, attention: str) -> PreTrainedModel:
    """Fresh weights as the family draws them, float32, on the CPU."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation=None if attention == "auto" else attention,
    )
    return model.requires_grad_(True)


def num_parameters_of(config: PretrainedConfig) -> int:
    """Of a model of this configuration; nothing is computed."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def _shapes_near(base: PretrainedConfig, num_parameters: int) -> Iterator[tuple[PretrainedConfig, int]]:
    """For each width from the base's up, the number of layers that gives the nearest size; not below the
    base's number of layers."""
    heads = base.num_attention_heads
    unit = math.gcd(heads, getattr(base, "num_key_value_heads", None) or heads)
    for step in itertools.count(unit):
        sizes = [num_parameters_of(_scaled(base, step / unit, layers)) for layers in (1, 2)]
        each = sizes[1] - sizes[0]
        layers = max(round((num_parameters - sizes[0]) / each) + 1, base.num_hidden_layers)
        size = sizes[0] + (layers - 1) * each
        if size > num_parameters * (1 + _TOLERANCE) + each:
            return
        yield _scaled(base, step / unit, layers), size


def _scaled(base: PretrainedConfig, factor: float, layers: int) -> PretrainedConfig:
    """The base's configuration with its width, heads and MLP times `factor`, and so many layers."""
    values: dict[str, Any] = {name: value for name, value in base.to_dict().items() if name not in _DERIVED}
    names = getattr(base, "attribute_map", {})
    head_dim = getattr(base, "head_dim", None)

    def scale(name: str, multiple: int = 1) -> None:
        own = names.get(name, name)
        if values.get(own) is not None:
            values[own] = round(values[own] * factor / multiple) * multiple

    scale("hidden_size")
    scale("num_attention_heads")
    scale("num_key_value_heads")
    if factor != 1:
        scale("intermediate_size", _MULTIPLE)
        scale("n_inner", _MULTIPLE)
        scale("ffn_dim", _MULTIPLE)
    values[names.get("num_hidden_layers", "num_hidden_layers")] = layers
    if head_dim is not None:
        values["head_dim"] = head_dim
    return type(base)(**values)


def _aspect(config: PretrainedConfig) -> float:
    return float(config.hidden_size / config.num_hidden_layers)

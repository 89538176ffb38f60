"""Part of `train`: the base's output head, which the memory's may start from, out of the base's files.

One matrix is read, not the model: a base of 8 B in float32 would take 32 GB of host memory on each rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.engines.model_files import model_file
from mlpmem_ds.models.backbone import load_base
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.training.config import Config


def base_head(
    config: Config, source: TransformersSource | None, memory: MemoryConfig
) -> Callable[[], torch.Tensor] | None:
    """What reads the base's output head, float32 [V, H], where the memory's starts from it; for one rank.

    Collective where the base is cut over the ranks.

    Raises:
        UserError: it does not have the memory's vocabulary and width.
    """
    if config.head == "random":
        return None
    assert config.model is not None
    read: Callable[[], torch.Tensor]
    if source is not None and source.is_collective:
        weight_VH = source.head_weight().detach().clone()
        shape, read = tuple(weight_VH.shape), partial(_same, weight_VH)
    else:
        shape, read = head_of_files(config.model)
    expected = (memory.vocab_size, memory.hidden_size)
    if shape != expected:
        raise UserError(
            f"--head base: the base's head is {shape} (vocabulary, width), the memory's {expected}: leave out"
            " --hidden-size, or use --head random"
        )
    return read


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def head_of_files(name_or_path: str) -> tuple[tuple[int, ...], Callable[[], torch.Tensor]]:
    """(shape, what reads it as float32) of a model's output head.

    The whole model is loaded only where its files do not name the head as its class does: pickled weights,
    and weights that are renamed while they are loaded.

    Raises:
        UserError: there is no such model, or it has no linear head.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(name_or_path, trust_remote_code=False), trust_remote_code=False
            )
        weight_VH = output_head(model)[0]
    except Exception:  # a class that cannot be made without numbers: of any kind
        weight_VH = _load_head(name_or_path)
        return tuple(weight_VH.shape), partial(_same, weight_VH)
    prefix = f"{model.base_model_prefix}."
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is weight_VH]
    place = _find(name_or_path, [*names, *(name.removeprefix(prefix) for name in names)])
    read = partial(_load_head, name_or_path) if place is None else partial(_read, *place)
    return tuple(weight_VH.shape), read


def _find(name_or_path: str, names: Collection[str]) -> tuple[Path, str] | None:
    """(safetensors file, name) of the first of these names that the model's files have."""
    if index := model_file(name_or_path, "model.safetensors.index.json"):
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name in names:
            if name in file_of and (path := model_file(name_or_path, file_of[name])):
                return path, name
    elif path := model_file(name_or_path, "model.safetensors"):
        with safe_open(path, framework="pt") as file:
            names_of_file = set(file.keys())
        for name in names:
            if name in names_of_file:
                return path, name
    return None


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name).float()
    return tensor


def _load_head(name_or_path: str) -> torch.Tensor:
    try:
        model = load_base(name_or_path, dtype=torch.float32, device="cpu")
        return output_head(model)[0].detach().clone()
    except ValueError as error:
        raise UserError(str(error)) from error

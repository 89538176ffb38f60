"""Part of `train`: single tensors of the base, which a memory may start from, out of the base's files.

One matrix is read, not the model: a base of 8 B in float32 would take 32 GB of host memory on each rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors import safe_open

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines.model_files import model_file
from mlpmem_ds.formats.model_directory import fault_of
from mlpmem_ds.models.base_loading import load_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read: TypeAlias = Callable[[], torch.Tensor]
"""reads a tensor, float32 on the CPU"""


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """A base: its modules, as a rule without numbers (on the device `meta`), and what reads these."""

    name_or_path: str
    model: PreTrainedModel

    def reader(self, tensor: torch.Tensor, *, rows: int | None = None) -> Read:
        """What reads the numbers of a parameter of `model`, or its first `rows`.

        The whole model is loaded only where its files do not name the tensor as its class does: pickled
        weights, and weights that are renamed while they are loaded.
        """
        if not tensor.is_meta:
            return partial(_same, tensor.detach()[slice(rows)].float())
        prefix = f"{self.model.base_model_prefix}."
        parameters = self.model.named_parameters(remove_duplicate=False)
        names = [name for name, parameter in parameters if parameter is tensor]
        place = _find(self.name_or_path, [*names, *(name.removeprefix(prefix) for name in names)])
        if place is None:
            return partial(_load_tensor, self.name_or_path, names[0], rows)
        return partial(_read, *place, rows)


def open_base_files(name_or_path: str) -> BaseFiles:
    """The modules of a base, of which nothing is read where its class can be made without numbers.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(name_or_path, trust_remote_code=False), trust_remote_code=False
            )
    except Exception:  # a class that cannot be made without numbers: of any kind
        model = _load(name_or_path)
    return BaseFiles(name_or_path=name_or_path, model=model)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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


def _read(path: Path, name: str, rows: int | None) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[:rows]
    return tensor.float()


def _load(name_or_path: str) -> PreTrainedModel:
    try:
        return load_base(name_or_path, dtype=torch.float32, device="cpu")
    except ValueError as error:
        raise UserError(f"{name_or_path}: {fault_of(name_or_path, error)}") from error


def _load_tensor(name_or_path: str, name: str, rows: int | None) -> torch.Tensor:
    parameters = dict(_load(name_or_path).named_parameters(remove_duplicate=False))
    return parameters[name].detach()[slice(rows)].clone()

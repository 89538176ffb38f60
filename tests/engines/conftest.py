"""Models of any family, tiny and random, as directories."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SaveModel = Callable[[str, Mapping[str, Any], Path], str]


@pytest.fixture(scope="session")
def save_model() -> SaveModel:
    """`save_model(family, settings, path)` writes the model and gives its path. No parameter is 0 or 1."""

    def save(family: str, settings: Mapping[str, Any], path: Path) -> str:
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(path)
        return str(path)

    return save

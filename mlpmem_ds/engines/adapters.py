"""Low-rank matrices next to a model's linear layers (LoRA), with the peft library; it alone is used here.

Place in the pipeline: `train_baseline --kind lora`. The matrices are put into the model in place, so that its
forward, its decoder and its head are found as before.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mlpmem_ds.core.errors import package_for

_LINEAR_LAYERS = "all-linear"  # peft's word: every one but the output head


def require_peft() -> Any:
    """The library; it takes seconds to import.

    Raises:
        UserError: it is not installed.
    """
    with package_for("--kind lora", "peft", "pip install peft, or '.[lora]' of this package"):
        return importlib.import_module("peft")


class LowRankModel:
    """A model whose linear layers, all but the output head, have matrices A [rank, in] and B [out, rank] next
    to them: y = W x + alpha / rank * B A x. B starts at zero, the model as it was; only A and B are trained.

    Args:
        model: on any device; it is changed in place.
        rank: of each product.
        alpha: see above.
        name: of the model, which the adapter's files say they belong to.
    """

    def __init__(self, model: PreTrainedModel, *, rank: int, alpha: float, name: str = "") -> None:
        peft = require_peft()
        model.name_or_path = name
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=_LINEAR_LAYERS, r=rank, lora_alpha=alpha
        )
        self._wrapped = peft.get_peft_model(model, config)
        self.model: PreTrainedModel = self._wrapped.get_base_model()

    @property
    def num_trained(self) -> int:
        """Numbers in all A and B."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    @property
    def names(self) -> list[str]:
        """Of A and B, as in the model's state dict."""
        return [name for name, weight in self.model.named_parameters() if weight.requires_grad]

    def take(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set A and B, by their names in the model."""
        missing = set(self.names) - set(weights)
        assert not missing, sorted(missing)[:3]
        self.model.load_state_dict(dict(weights), strict=False)

    def save_adapter(self, root: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, which peft reads, below `root`."""
        self._wrapped.save_pretrained(str(root))

    def merged(self) -> PreTrainedModel:
        """The model with alpha / rank * B A added to its weights, without the matrices; takes this one."""
        merged: PreTrainedModel = self._wrapped.merge_and_unload()
        return merged


def parameters_of_rank_one(model: PreTrainedModel) -> int:
    """Numbers that each rank adds, inputs and outputs of the linear layers together; nothing is computed."""
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(model.config)
        return LowRankModel(twin, rank=1, alpha=1.0).num_trained

"""A base's final norm, found by structure, and its kind, found by trying it."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.models.final_norm import final_norm, kind_of_norm
from mlpmem_ds.models.memory import make_norm
from mlpmem_ds.models.memory_config import NORMS
from mlpmem_ds.models.structure import UnknownStructureError

from .families import BASES, tiny_base

# model type -> (path of its final norm, its kind)
EXPECTED = {
    "gpt2": ("transformer.ln_f", "layer"),
    "llama": ("model.norm", "rms"),
    "gemma2": ("model.norm", "rms-one-plus"),
    "gpt_neox": ("gpt_neox.final_layer_norm", "layer"),
    "opt": ("model.decoder.final_layer_norm", "layer"),
    "cohere": ("model.norm", "layer-no-bias"),
    "bloom": ("transformer.ln_f", "layer"),
    "olmo": ("model.norm", "layer-plain"),
    "nemotron": ("model.norm", "layer-one-plus"),
    "mpt": ("transformer.norm_f", "layer-no-bias"),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_it_is_found_without_numbers(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASES[family]))
    path, kind = EXPECTED[family]
    norm = final_norm(model)
    assert norm is model.get_submodule(path) and kind_of_norm(norm)[0] == kind


def test_a_base_without_one_and_one_with_a_matrix_between() -> None:
    assert final_norm(tiny_base("opt_without_norm")) is None
    with pytest.raises(UnknownStructureError, match="a matrix among"):
        final_norm(tiny_base("opt_post_norm"))


def test_several_are_refused() -> None:
    model = tiny_base("gpt2")
    model.transformer.other = nn.LayerNorm(32)
    with pytest.raises(UnknownStructureError, match="several norms among"):
        final_norm(model)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_every_kind_of_ours_is_known_again(kind: str, epsilon: float) -> None:
    norm = make_norm(kind, 24, epsilon)
    if NORMS[kind] == 0:
        assert kind_of_norm(norm) == (kind, epsilon)
        return
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    assert kind_of_norm(norm.to("meta")) == (kind, epsilon)


def test_another_kind_is_refused() -> None:
    class Halved(nn.LayerNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) / 2

    with pytest.raises(UnknownStructureError, match="Halved, is of no known kind"):
        kind_of_norm(Halved(24))

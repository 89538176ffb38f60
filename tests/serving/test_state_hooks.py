"""States of inner layers: those that the project's own capture reads, also where a layer gives two parts."""

import pytest
import torch
from torch import nn

from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.serving.state_hooks import StateHooks, layers_of

from ..models.conftest import random_ids, tiny_base

POINTS = (
    CapturePoint(layer=1),
    CapturePoint(layer=3),
    CapturePoint(layer=0, point="layer_output"),
    CapturePoint(layer=2, point="layer_output"),
)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_hooks_read_what_the_capture_reads(family: str) -> None:
    base, ids_BS = tiny_base(family), random_ids(1, 7)
    expected = capture(base, POINTS)(ids_BS).states
    hooks = StateHooks(layers_of(base, 4, None), POINTS)
    base(input_ids=ids_BS)
    for point, state in zip(POINTS, hooks.take(), strict=True):
        assert torch.equal(state.reshape(7, -1), expected[point][0])


class InTwoParts(nn.Module):
    """A layer as vLLM's: the next one adds both parts, and writes over them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, state: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual += state
        return self.mlp(residual), residual


def test_the_parts_of_a_layer_are_added_before_the_next_one_writes_over_them() -> None:
    layers = nn.ModuleList([InTwoParts(), InTwoParts()])
    hooks = StateHooks(layers, [CapturePoint(layer=0, point="layer_output")])
    with torch.no_grad():
        state, residual = layers[0](torch.ones(2, 4), torch.zeros(2, 4))
        expected = state + residual
        layers[1](state, residual)
    (found,) = hooks.take()
    assert torch.equal(found, expected) and not torch.equal(residual, torch.ones(2, 4))


def test_a_forward_that_did_not_run_the_layers_is_an_error() -> None:
    hooks = StateHooks(nn.ModuleList([InTwoParts()]), [CapturePoint(layer=0)])
    with pytest.raises(RuntimeError, match="without compilation"):
        hooks.take()
    assert StateHooks([], []).take() == []


def test_layers_are_found_by_number_or_path() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList([InTwoParts(), InTwoParts()])
            self.second = nn.ModuleList([InTwoParts(), InTwoParts()])

    with pytest.raises(ValueError, match="2 lists of 2 layers.*final_norm"):
        layers_of(Experts(), 2, None)
    with pytest.raises(ValueError, match="0 lists of 5 layers"):
        layers_of(Experts(), 5, None)
    model = Experts()
    assert layers_of(model, 2, "second") is model.second
    assert layers_of(nn.ModuleList([InTwoParts()]), 1, "no.such.path") is not None


def test_a_layer_without_an_mlp_is_refused() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Tanh())])
    with pytest.raises(ValueError, match="no MLP is found in layer 0.*final_norm"):
        StateHooks(layers, [CapturePoint(layer=0)])

"""The end of a base gives the base's logits at the memory's inputs, for every family, a tile at a time."""

from pathlib import Path

import pytest
import torch

from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.base_end import BaseEnd
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.training.joined import read_base_end

from .families import BASES, tiny_base

POINTS = {name: CapturePoint(layer=-1, point=name) for name in ("layer_output", "final_norm")}


@pytest.mark.parametrize("family", sorted(set(BASES) - {"opt_post_norm"}))
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_its_logits_are_the_bases(family: str, point: CapturePoint, tmp_path: Path) -> None:
    model = tiny_base(family)
    model.save_pretrained(tmp_path)
    end = read_base_end(str(tmp_path), point, num_layers=3)
    ids_BS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    inputs_ND = capture(model, [point])(ids_BS).states[point].flatten(0, 1)
    wider_NI = torch.cat([torch.randn(18, 5), inputs_ND], dim=1)  # of several points, the last one counts
    expected_NV = model(input_ids=ids_BS).logits.flatten(0, 1).log_softmax(-1)
    for inputs in (inputs_ND, wider_NI):
        logits = end.to(torch.device("cpu"), torch.float32).logits(inputs)
        parts = [logits.tile(slice(2, 9), columns) for columns in (slice(0, 40), slice(40, None))]
        assert (torch.cat(parts, dim=1).log_softmax(-1) - expected_NV[2:9]).abs().max() < 2e-5


def test_it_is_moved_whole_and_keeps_nothing_for_autograd() -> None:
    end = BaseEnd(weight_VD=torch.randn(7, 4), bias_V=torch.randn(7), norm=torch.nn.LayerNorm(4))
    moved = end.to(torch.device("cpu"), torch.bfloat16)
    assert moved.weight_VD.dtype == moved.bias_V.dtype == moved.norm.weight.dtype == torch.bfloat16
    logits = moved.logits(torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True))
    assert not logits.hidden_NB.requires_grad

"""Rows of several states: in order, cut apart as they were put together; what needs more is refused."""

from types import SimpleNamespace

import pytest
import torch

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gates import HistoryGate, RouterGate
from mlpmem_ds.models.mixture import Constant
from mlpmem_ds.serving.row_layout import RowLayout, check_single_positions, layout_of

from ..models.conftest import WIDTH, tiny_joint

LAST = CapturePoint(layer=3, point="final_norm")
MIDDLE = CapturePoint(layer=2, point="ffn_input")
SEVERAL = CapturePoint(layer=3, point="final_norm", earlier=(2, 0))


@pytest.mark.parametrize(
    ("points", "sources"),
    [
        ({"memory_input": LAST}, []),
        ({"memory_input": MIDDLE}, [MIDDLE]),
        ({"a": MIDDLE, "b": MIDDLE, "c": LAST}, [MIDDLE]),
        (
            {"a": SEVERAL, "b": MIDDLE},
            [MIDDLE, *(CapturePoint(layer=layer, point="layer_output") for layer in (0, 2))],
        ),
    ],
)
def test_each_state_stands_in_a_row_once_and_comes_back(
    points: dict[str, CapturePoint], sources: list[CapturePoint]
) -> None:
    layout = RowLayout(points=points, width=4)
    assert list(layout.sources) == sources
    final, states = torch.randn(3, 4), {source: torch.randn(3, 4) for source in sources}
    rows = layout.join(final, list(states.values()))
    assert rows.shape == (3, 4 * (1 + len(sources)))
    found_final, found = layout.split(rows[[2, 0]])
    assert found_final.is_contiguous()
    torch.testing.assert_close(found_final, final[[2, 0]], rtol=0, atol=0)
    for name, point in points.items():
        parts = [final if part.point == "final_norm" else states[part] for part in point.parts]
        torch.testing.assert_close(found[name], torch.cat(parts, dim=-1)[[2, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_number_of_states_than_are_read_is_refused(count: int) -> None:
    layout = RowLayout(points={"a": SEVERAL, "b": MIDDLE}, width=4)
    message = f"handed over {count} inner states, and 3 are read \\(ffn_input of layer 2, layer_output"
    with pytest.raises(RuntimeError, match=message):
        layout.join(torch.randn(3, 4), [torch.randn(3, 4)] * count)


def test_the_layout_of_a_bank_and_of_a_gate_that_reads_a_state() -> None:
    config = tiny_joint("llama", num_memories=2).config
    gate = RouterGate(lmbdas=[0.2, 0.2], base_size=WIDTH, memory_sizes=[24, 20])
    layout = layout_of(config, gate)
    assert layout.points == {
        "final": LAST,
        "memory_input": MIDDLE,
        "memory_input_1": CapturePoint(layer=3, point="layer_output"),
    }
    assert layout.width == WIDTH


def test_a_last_state_of_another_layer_is_refused() -> None:
    config = tiny_joint("llama").config
    config.input_point, config.input_layer = "final_norm", 1
    with pytest.raises(ValueError, match="not at layer 1 of 4"):
        layout_of(config, Constant(0.5))


def test_what_needs_earlier_positions_is_refused_with_a_remedy() -> None:
    one, three = SimpleNamespace(window=1), SimpleNamespace(window=3)
    check_single_positions([one, one], Constant(0.5))
    with pytest.raises(ValueError, match="fit_gate --kind confidences.*--hf-overrides"):
        check_single_positions([one], HistoryGate(lmbdas=[0.3]))
    with pytest.raises(ValueError, match="states of 3 positions.*--window 1"):
        check_single_positions([one, three], Constant(0.5))

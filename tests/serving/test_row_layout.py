"""Rows of several states: in order, cut apart as they were put together, with what they carry of the past."""

import pytest
import torch

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gates import HistoryGate, RouterGate
from mlpmem_ds.models.mixture import Constant
from mlpmem_ds.serving.row_layout import RowLayout, layout_of

from ..joint_models import joined
from ..models.conftest import WIDTH, tiny_base, tiny_joint, tiny_memory

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
    found_final, found, history = layout.split(rows[[2, 0]])
    assert found_final.is_contiguous() and history is None and not layout.reads_past
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
    assert (layout.windows, layout.past, layout.history_size) == ({}, 0, 0)


def test_the_layout_of_a_window_and_of_a_history() -> None:
    memory = tiny_memory(input_size=3 * WIDTH, window=3)
    joint = joined(tiny_base("llama"), memory, lmbda=0.4, input_point=MIDDLE)
    layout = layout_of(joint.config, HistoryGate(lmbdas=[0.3]))
    assert (layout.windows, layout.past, layout.history_size) == ({"memory_input": 3}, 2, 4)
    assert layout.reads_past and layout.own_width == 2 * WIDTH


def test_a_last_state_of_another_layer_is_refused() -> None:
    config = tiny_joint("llama").config
    config.input_point, config.input_layer = "final_norm", 1
    with pytest.raises(ValueError, match="not at layer 1 of 4"):
        layout_of(config, Constant(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_row_carries_of_the_tokens_before_comes_back(dtype: torch.dtype) -> None:
    """The history bit by bit, in rows of any dtype; the states of a window with the oldest first."""
    layout = RowLayout(points={"a": MIDDLE, "b": LAST}, width=4, windows={"a": 2, "b": 3}, history_size=3)
    own, one_before, two_before = torch.randn(3, 5, 8).to(dtype)
    history = torch.randn(5, 3)
    rows = torch.cat([own, one_before, two_before, layout.pack(history, dtype)], dim=-1)
    assert rows.shape[-1] == 3 * layout.own_width + layout.history_width(dtype)
    final, states, found = layout.split(rows[[4, 1]])
    assert found is not None and torch.equal(found, history[[4, 1]])
    assert torch.equal(final, own[[4, 1], :4])
    assert torch.equal(states["a"], torch.cat([one_before[:, 4:], own[:, 4:]], dim=-1)[[4, 1]])
    finals = [each[:, :4] for each in (two_before, one_before, own)]
    assert torch.equal(states["b"], torch.cat(finals, dim=-1)[[4, 1]])

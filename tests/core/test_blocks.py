import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.core.blocks import Block, Window, deal, split_blocks, split_windows


def test_blocks_cover_everything_once() -> None:
    assert split_blocks(7, 3) == [Block(0, 3), Block(3, 6), Block(6, 7)]
    assert split_blocks(0, 3) == []


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_dealing_is_a_partition_for_any_world(size: int) -> None:
    items = list(range(17))
    dealt = [deal(items, rank, size) for rank in range(size)]
    assert sorted(item for hand in dealt for item in hand) == items
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_predict_each_position_once_with_enough_context(
    total: int, block_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, block_size))
    windows = split_windows(total, block_size, stride)
    assert [position for window in windows for position in range(window.start, window.stop)] == list(
        range(total)
    )
    for window in windows:
        assert window.stop - window.context_start == min(block_size, total)
        assert window.context_start <= window.start < window.stop
    for window in windows[1:]:
        assert window.start - window.context_start >= block_size - stride


def listed_windows(total: int, block_size: int, stride: int) -> list[Window]:
    """The oracle: one after another."""
    length = min(block_size, total)
    windows = [Window(0, 0, length)] if total else []
    while windows and windows[-1].stop < total:
        start = windows[-1].stop
        stop = min(start + stride, total)
        windows.append(Window(stop - length, start, stop))
    return windows


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_by_arithmetic_are_those_of_the_listing(
    total: int, block_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, block_size))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 220), st.integers(0, 220))))
    windows, listed = split_windows(total, block_size, stride), listed_windows(total, block_size, stride)
    assert list(windows) == listed and len(windows) == len(listed)
    assert windows[start // 9 : stop // 9] == listed[start // 9 : stop // 9]
    wanted = (
        [window for window in listed if window.start < stop and window.stop > start] if start < stop else []
    )
    assert [windows[number] for number in windows.covering(Block(start, stop))] == wanted
    starts = [window.start for window in listed for _ in range(window.start, window.stop)]
    assert windows.starts_of(np.arange(total)).tolist() == starts


def test_a_trillion_positions_cost_nothing() -> None:
    windows = split_windows(10**12, 1024, 512)
    numbers = windows.covering(Block(5 * 10**11, 5 * 10**11 + 65536))
    assert windows[numbers[0]].start <= 5 * 10**11 < windows[numbers[0]].stop
    assert windows[numbers[-1]].stop >= 5 * 10**11 + 65536 and len(numbers) in (128, 129)
    assert windows[-1].stop == 10**12 and windows[-1].stop - windows[-1].context_start == 1024
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_a_stride_longer_than_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="stride of 5"):
        split_windows(10, 4, 5)

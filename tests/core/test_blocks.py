import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.core.blocks import Block, deal, split_blocks, split_windows


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
    assert [position for window in windows for position in range(window.start, window.stop)] == list(range(total))
    for window in windows:
        assert window.stop - window.context_start == min(block_size, total)
        assert window.context_start <= window.start < window.stop
    for window in windows[1:]:
        assert window.start - window.context_start >= block_size - stride


def test_a_stride_longer_than_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="stride of 5"):
        split_windows(10, 4, 5)

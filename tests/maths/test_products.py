"""Products against float64, by whichever library does them here, and by the other."""

import pytest
import torch

from mlpmem_ds.maths import products
from mlpmem_ds.maths.products import (
    cached_rows,
    fill_logits,
    product,
    set_transposed_product,
    vocabulary_tiles,
)


@pytest.fixture(params=["oneDNN if there", "MKL"])
def library(request, monkeypatch):
    if request.param == "MKL":
        monkeypatch.setattr(products, "_has_onednn", lambda: False)


def make_operands(dtype, rows=70, inner=96, columns=260):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).to(dtype)
    return left, torch.randn(inner, columns, generator=generator).to(dtype)


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_products_of_any_layout_are_float32_and_right(library, dtype, bound):
    left, right = make_operands(dtype)
    expected = left.double() @ right.double()
    wide = torch.zeros(96, 600, dtype=dtype)
    wide[:, 100:360] = right
    for operand in (right, right.t().contiguous().t(), wide[:, 100:360]):
        found = product(left, operand)
        assert found.dtype == torch.float32 and relative_error(found, expected) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_transposed_product_is_set_and_then_added(library, dtype, bound):
    left, right = make_operands(dtype)
    expected = (left.double() @ right.double()).t()
    total = torch.full((300, 70), torch.nan)
    for times in (1, 2, 3):
        set_transposed_product(total[20:280], left, right, accumulate=times > 1)
        assert relative_error(total[20:280], times * expected) <= bound
    assert total[:20].isnan().all() and total[280:].isnan().all()


def test_a_transposed_product_is_set_in_16_bits():
    left, right = make_operands(torch.bfloat16)
    total = torch.full((300, 70), torch.nan, dtype=torch.bfloat16)
    set_transposed_product(total[20:280], left, right, accumulate=False)
    assert relative_error(total[20:280], (left.double() @ right.double()).t()) <= 4e-3
    assert total[:20].isnan().all() and total[280:].isnan().all()


def test_logits_over_several_tiles(library):
    hidden, weight = make_operands(torch.float32, rows=17)[0], torch.randn(2100, 96)
    logits = torch.full((17, 2100), torch.nan)
    fill_logits(logits, hidden, weight)
    assert relative_error(logits, hidden.double() @ weight.double().t()) <= 1e-6


def test_tiles_cover_the_vocabulary_and_a_gpu_has_one():
    tiles = list(vocabulary_tiles(2100, torch.device("cpu")))
    assert len(tiles) == 3 and [column for tile in tiles for column in range(2100)[tile]] == list(range(2100))
    assert list(vocabulary_tiles(2100, torch.device("cuda"))) == [slice(0, 2100)]
    assert list(vocabulary_tiles(0, torch.device("cpu"))) == []


def test_rows_for_the_cache_cover_the_matrix():
    wide, narrow = torch.empty(7, 2**20), torch.empty(7, 3)
    assert [row for rows in cached_rows(wide) for row in range(7)[rows]] == list(range(7))
    assert len(list(cached_rows(wide))) == 7 and list(cached_rows(narrow)) == [slice(0, 7)]
    assert list(cached_rows(wide[:0])) == [] and list(cached_rows(wide[:, :0])) == [slice(0, 7)]
    assert list(cached_rows(wide.to("meta"))) == [slice(0, 7)]


def test_onednn_is_spared_what_it_does_slowly_or_not_at_all(monkeypatch):
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    left, right = make_operands(torch.float32)
    assert products._suits_onednn(left, right) and products._suits_onednn(
        left[:1], right.t().contiguous().t()
    )
    assert not products._suits_onednn(left, right[:, :200])  # rows with gaps: a reference loop
    assert not products._suits_onednn(left[:, :9], right[:9].contiguous())
    assert not products._suits_onednn(left.double(), right.double())


def test_padded_rows_start_where_tensor_cores_want_them():
    assert [products.padded_columns(columns) for columns in (1, 128, 129, 50257)] == [128, 128, 256, 50304]
    logits = products.padded_rows(torch.arange(2 * 256 + 5), 2, 130)
    assert logits.shape == (2, 130) and logits.stride() == (256, 1) and logits[1, 0] == 256


class TestWiderTotal:
    """Whether a GPU's addmm adds to a float32 total is found once, and running out of memory says nothing."""

    @pytest.fixture(autouse=True)
    def _forget(self):
        products.adds_to_wider_total.cache_clear()
        yield
        products.adds_to_wider_total.cache_clear()

    def pretend(self, monkeypatch, error):
        calls = []

        def addmm(total, left, right, *, out_dtype, out):
            calls.append(tuple(total.shape))
            if error is not None:
                raise error
            out += left.float() @ right.float()

        monkeypatch.setattr(torch, "addmm", addmm)
        return calls

    def add(self):
        total = torch.ones(4, 3)
        left, right = make_operands(torch.bfloat16, 4, 5, 3)
        products._set_widened_product(total, left, right, True)
        assert relative_error(total, 1 + left.double() @ right.double()) <= 1e-2

    def test_where_it_does(self, monkeypatch, caplog):
        calls = self.pretend(monkeypatch, None)
        with caplog.at_level("INFO", logger="mlpmem_ds"):
            self.add(), self.add()
        assert calls == [(16, 16), (4, 3), (4, 3)] and caplog.text.count("in one pass") == 1

    def test_where_it_does_not(self, monkeypatch, caplog):
        calls = self.pretend(monkeypatch, RuntimeError("self and mat2 must have the same dtype\n at Blas"))
        self.add(), self.add()
        assert calls == [(16, 16)]  # asked once, not at every chunk
        assert caplog.text.count("must have the same dtype): the gradient") == 1

    def test_where_memory_runs_out(self, monkeypatch):
        calls = self.pretend(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
        for _ in range(2):  # and what it would have found is not decided by it
            with pytest.raises(torch.OutOfMemoryError):
                self.add()
        assert calls == [(16, 16), (16, 16)]

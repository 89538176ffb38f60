"""int8 memories: each layer against the rounded weights in float64, the joint model beside its float twin."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.models import quantized
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.quantized import Int8Linear

from ..joint_models import joined

VOCAB = 61


def joint_model(seed: int, family: str = "swiglu") -> MemoryAugmentedLM:
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, initializer_range=0.3))
    shape = MemoryConfig(
        input_size=32, hidden_size=24, intermediate_size=40, num_blocks=2, vocab_size=VOCAB, family=family,
        initializer_range=0.4,
    )  # fmt: skip
    return joined(base.eval(), Memory(shape), lmbda=0.6, input_point=CapturePoint(layer=1))


def layer_of(num_inputs: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(num_inputs)
    layer = nn.Linear(num_inputs, 37, bias=bias).requires_grad_(False)
    layer.weight[3] = 0
    layer.weight[5] *= 50  # rows of very different sizes: one scale would not do
    return layer


@pytest.mark.parametrize("has_product", [True, False])
def test_no_rows_give_no_rows(has_product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_has_product", lambda device: has_product)
    assert Int8Linear(layer_of(50, bias=True))(torch.zeros(0, 50)).shape == (0, 37)


@pytest.mark.parametrize(("num_inputs", "bias"), [(24, True), (50, False), (64, True), (129, False)])
def test_products_are_those_of_weights_rounded_by_rows(num_inputs: int, bias: bool) -> None:
    layer = layer_of(num_inputs, bias=bias)
    twin = Int8Linear(layer)
    step_N1 = layer.weight.double().abs().amax(1, keepdim=True) / 127
    step_N1[3] = 1
    rounded_NK = (layer.weight.double() / step_N1).round() * step_N1
    assert ((rounded_NK - layer.weight.double()).abs() <= step_N1 / 2).all()
    inputs = torch.randn(2, 3, num_inputs)
    wanted = inputs.bfloat16().double() @ rounded_NK.t()
    if bias:
        wanted += layer.bias.double()
    found = twin(inputs)
    assert found.shape == (2, 3, 37) and found.dtype == torch.float32
    scale = (inputs.bfloat16().double() @ rounded_NK.t()).abs() + 1e-6
    assert ((found - wanted).abs() <= scale * 2**-8 + 1e-5).all()
    assert torch.equal(found[1, 2], twin(inputs[1, 2]))  # a row alone as in a batch
    assert twin(inputs.bfloat16()).dtype == torch.bfloat16
    assert twin.codes.dtype == torch.int8 and twin.codes.shape[0] == 37


def test_without_the_processors_product_weights_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(50, bias=True)
    twin, inputs = Int8Linear(layer), torch.randn(4, 50)
    monkeypatch.setattr(quantized, "_has_product", lambda device: False)
    wanted = (
        inputs.double() @ (twin.codes[:, :50].double() * twin.scale.double()[:, None]).t()
        + layer.bias.double()
    )
    torch.testing.assert_close(twin(inputs).double(), wanted, atol=1e-5, rtol=1e-5)
    assert twin((1000 * inputs).half()).isfinite().all()


@pytest.mark.parametrize("family", ["gelu", "swiglu"])
def test_the_mixture_stays_close_and_the_base_untouched(family: str) -> None:
    plain, rounded = joint_model(1, family), joint_model(1, family)
    num_floats = sum(tensor.numel() for tensor in plain.memory.parameters())
    assert rounded.quantize_memory() is rounded
    linears = [module for module in rounded.memory.modules() if isinstance(module, nn.Linear | Int8Linear)]
    assert all(isinstance(module, Int8Linear) for module in linears) and len(linears) == (
        6 if family == "gelu" else 8
    )
    assert (
        sum(tensor.numel() for tensor in rounded.memory.parameters()) < num_floats / 10
    )  # the norms are left
    tokens = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (model(tokens).logits.double().log_softmax(-1) for model in (plain, rounded))
        divergence = (before.exp() * (before - after)).sum(-1)
        assert 0 < divergence.mean() < 2e-3 and before.exp().max() > 0.3
        plain.lmbda = rounded.lmbda = 0.0
        assert torch.equal(plain(tokens).logits, rounded(tokens).logits)


def generated(model: MemoryAugmentedLM, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )[:, tokens.shape[1] :]


def test_a_padded_batch_generates_what_each_prompt_does_alone() -> None:
    model = joint_model(2).quantize_memory()
    prompts = [[5, 9, 33], [7, 8, 12, 40, 3, 19], [50]]
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    together = generated(model, tokens, mask)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(
            row, generated(model, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long))[0]
        )


def test_it_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save it before quantize_memory\(\)"):
        joint_model(3).quantize_memory().save_pretrained(tmp_path / "export")
    assert not (tmp_path / "export").exists()

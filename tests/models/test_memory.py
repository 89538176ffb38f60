"""The memory: shapes, initialization, the parameter formula, and its arithmetic against fp64 written out by
hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mlpmem_ds.models.memory import Memory, MemoryHead, NormalLinear, make_norm
from mlpmem_ds.models.memory_config import NORMS, PRESETS, MemoryConfig

FAMILIES = ("gelu", "swiglu")


def config_of(family: str, **changes: object) -> MemoryConfig:
    values = {
        "input_size": 7,
        "hidden_size": 10,
        "intermediate_size": 23,
        "num_blocks": 3,
        "vocab_size": 31,
        "family": family,
    }
    return MemoryConfig.from_dict({**values, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("input_size", [7, 10])
def test_parameter_formula_equals_the_module(family: str, input_size: int) -> None:
    config = config_of(family, input_size=input_size)
    assert config.num_parameters() == sum(parameter.numel() for parameter in Memory(config).parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("final_norm", [True, False])
def test_the_formula_counts_what_comes_from_a_base(family: str, norm: str, final_norm: bool) -> None:
    config = config_of(family, norm=norm, final_norm=final_norm, head_bias=True)
    memory = Memory(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in memory.parameters())
    assert memory(torch.randn(2, 7)).shape == (2, 10)


def test_only_what_differs_from_the_memory_of_always_is_in_its_dict() -> None:
    assert set(config_of("gelu").to_dict()) == {
        *("input_size", "hidden_size", "intermediate_size", "num_blocks", "vocab_size"),
        *("family", "norm_epsilon", "initializer_range"),
    }
    changed = config_of("gelu", norm="rms", final_norm=False, head_bias=True, logit_softcap=3.0)
    assert changed.to_dict()["logit_softcap"] == 3.0 and "logit_scale" not in changed.to_dict()
    assert MemoryConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


@pytest.mark.parametrize("kind", ["rms-one-plus", "layer-one-plus"])
def test_norms_whose_factor_is_one_plus_their_weight(kind: str) -> None:
    norm, plain = make_norm(kind, 10, 1e-5), make_norm(kind.removesuffix("-one-plus"), 10, 1e-5)
    rows = torch.randn(4, 10)
    torch.testing.assert_close(norm(rows), plain(rows))
    for name, parameter in norm.named_parameters():
        nn.init.normal_(parameter)
        plain.get_parameter(name).data.copy_(parameter.detach() + (name == "weight"))
    torch.testing.assert_close(norm(rows), plain(rows))
    assert norm(rows.bfloat16()).dtype == torch.bfloat16


def test_the_heads_logits_are_scaled_capped_and_biased() -> None:
    memory = Memory(config_of("gelu", head_bias=True, logit_scale=0.5, logit_softcap=2.0))
    nn.init.normal_(memory.head.bias)
    hidden = torch.randn(4, 10)
    linear = hidden @ memory.head.weight.T + memory.head.bias
    torch.testing.assert_close(memory.head(hidden), 2 * torch.tanh(linear / 2 / 2))
    assert memory.to(torch.bfloat16).cast(hidden).dtype == torch.bfloat16


def test_presets_have_the_sizes_that_their_names_promise() -> None:
    for name, nominal in {"1b": 1e9, "3b": 3e9, "7b": 7e9, "13b": 13e9}.items():
        assert abs(PRESETS[name](32_000).num_parameters() / nominal - 1) < 0.05, name
    # The paper's own counts, in millions (its tables 1 and 6): GPT-2's vocabulary, then Llama's and
    # Mistral's.
    published = {
        ("gelu-18x768", 50_257): 123.6,
        ("gelu-36x1024", 50_257): 353.7,
        ("gelu-54x1280", 50_257): 772.6,
        ("swiglu-8x4096-11008", 32_000): 1213.2,
        ("swiglu-8x4096-14336", 32_768): 1543.5,
    }
    for (name, vocab_size), millions in published.items():
        assert PRESETS[name](vocab_size).num_parameters() / 1e6 == pytest.approx(millions, abs=0.3), name
    with torch.device("meta"):
        memory = Memory(PRESETS["13b"](32_000))
    assert (
        sum(parameter.numel() for parameter in memory.parameters()) == PRESETS["13b"](32_000).num_parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_is_initialized_in_its_own_constructor(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each leaf is measured when its constructor returns, which is when deepspeed.zero.Init cuts it into
    shards."""
    measured: list[tuple[nn.Module, float]] = []
    constructor = NormalLinear.__init__

    def measuring(self: NormalLinear, *args: object, **kwargs: object) -> None:
        constructor(self, *args, **kwargs)  # type: ignore[arg-type]
        measured.append((self, self.weight.std().item()))
        assert self.bias is None or not self.bias.any()

    monkeypatch.setattr(NormalLinear, "__init__", measuring)
    torch.manual_seed(0)
    config = config_of(
        family, input_size=96, hidden_size=128, intermediate_size=384, vocab_size=200, initializer_range=0.03
    )
    memory = Memory(config)
    names = {module: name for name, module in memory.named_modules()}
    linears = [module for module in memory.modules() if isinstance(module, nn.Linear)]
    assert {module for module, _ in measured} == set(linears) and len(linears) >= 8
    for module, std in measured:
        residual = names[module].endswith("mlp.down")
        expected = 0.03 / math.sqrt(6) if residual else 0.03
        assert std == pytest.approx(expected, rel=0.05), names[module]
    for name, parameter in memory.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
    assert any(name.endswith("bias") for name, _ in memory.named_parameters() if ".mlp." in name) == (
        family == "gelu"
    )


PARTITIONED = """
import json, sys
import torch
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed.library import import_deepspeed
from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
deepspeed = import_deepspeed()
set_up_distributed(World())
torch.manual_seed(0)
stage_3 = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
result = {}
for values in json.loads(sys.argv[1]):
    with deepspeed.zero.Init(config_dict_or_path=stage_3):
        memory = Memory(MemoryConfig.from_dict(values))
    for name, parameter in memory.named_parameters():
        assert parameter.numel() == 0, "not partitioned"
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.float()
            result[values["family"] + " " + name] = [list(whole.shape), whole.mean().item(),
                whole.std().item()]
print(json.dumps(result))
"""


def test_initialization_is_right_under_zero_3(forked_commands: Path) -> None:
    """The trap: under zero.Init an initialization from outside the leaves leaves nn.Linear's own numbers."""
    configs = [
        config_of(family, input_size=96, hidden_size=128, intermediate_size=384, vocab_size=200)
        for family in FAMILIES
    ]
    done = subprocess.run(
        [forked_commands / "python", "-c", PARTITIONED, json.dumps([config.to_dict() for config in configs])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert len(measured) == sum(len(list(Memory(config).parameters())) for config in configs)
    for name, (shape, mean, std) in measured.items():
        if name.endswith("norm.weight"):
            assert (mean, std) == (1.0, 0.0), name
        elif name.endswith("bias"):
            assert (mean, std) == (0.0, 0.0), name
        else:
            expected = 0.02 / math.sqrt(6) if name.endswith("down.weight") else 0.02
            assert len(shape) == 2 and std == pytest.approx(expected, rel=0.05), name
            assert abs(mean) < 0.05 * std, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("input_size", [7, 10])
def test_forward_equals_the_equations_in_fp64(family: str, input_size: int) -> None:
    torch.manual_seed(1)
    memory = Memory(config_of(family, input_size=input_size, initializer_range=0.4)).double()
    for parameter in memory.parameters():  # biases and norms away from their neutral start
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {name: parameter.detach() for name, parameter in memory.named_parameters()}
    inputs = torch.randn(5, input_size, dtype=torch.float64)

    def norm(x: torch.Tensor, prefix: str) -> torch.Tensor:
        if family == "gelu":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{prefix}.weight"]
        return x + weights[f"{prefix}.bias"] if family == "gelu" else x

    x = inputs
    if input_size != 10:
        x = x @ weights["input_projection.weight"].T + weights["input_projection.bias"]
    for block in range(3):
        y = norm(x, f"blocks.{block}.norm")
        up = y @ weights[f"blocks.{block}.mlp.up.weight"].T
        if family == "gelu":
            up = up + weights[f"blocks.{block}.mlp.up.bias"]
            inner = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
            x = (
                x
                + inner @ weights[f"blocks.{block}.mlp.down.weight"].T
                + weights[f"blocks.{block}.mlp.down.bias"]
            )
        else:
            gate = y @ weights[f"blocks.{block}.mlp.gate.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"blocks.{block}.mlp.down.weight"].T
    hidden = norm(x, "final_norm")
    torch.testing.assert_close(memory(inputs), hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(memory.head(hidden), hidden @ weights["head.weight"].T, rtol=1e-12, atol=1e-12)


def test_positions_do_not_mix_and_leading_dimensions_are_free() -> None:
    torch.manual_seed(2)
    memory = Memory(config_of("swiglu")).double()
    inputs = torch.randn(2, 3, 7, dtype=torch.float64)
    hidden = memory(inputs)
    assert hidden.shape == (2, 3, 10) and memory.head(hidden).shape == (2, 3, 31)
    torch.testing.assert_close(hidden[1, 2], memory(inputs[1, 2]))


def test_another_head_class_is_called_with_the_sizes() -> None:
    class LossHead(MemoryHead):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden).logsumexp(-1)

    memory = Memory(config_of("gelu"), head_class=LossHead)
    assert memory.head(memory(torch.randn(4, 7))).shape == (4,)
    plain = Memory(config_of("gelu"))
    assert plain.load_state_dict(memory.state_dict()).missing_keys == []


def test_config_round_trip_and_refusals() -> None:
    config = config_of("swiglu", norm_epsilon=1e-6)
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown keys.*num_layers"):
        MemoryConfig.from_dict({**config.to_dict(), "num_layers": 3})
    with pytest.raises(ValueError, match="missing keys.*vocab_size"):
        MemoryConfig.from_dict({key: value for key, value in config.to_dict().items() if key != "vocab_size"})
    for name, value in {
        "family": "relu",
        "hidden_size": 0,
        "num_blocks": 2.0,
        "vocab_size": True,
        "norm_epsilon": 0.0,
        "initializer_range": float("inf"),
        "norm": "batch",
        "final_norm": 1,
        "head_bias": "yes",
        "logit_scale": 0.0,
        "logit_softcap": -1.0,
    }.items():
        with pytest.raises(ValueError, match=name):
            MemoryConfig.from_dict({**config.to_dict(), name: value})

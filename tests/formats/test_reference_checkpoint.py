"""Published memories: the same logits as an independent computation with their names, and no code run for a
hostile file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.reference_checkpoint import open_reference
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig

WIDTH, INNER, VOCAB, BLOCKS = 16, 40, 31, 3
GPT2 = {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": BLOCKS, "layer_norm_epsilon": 1e-5}
LLAMA = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "rms_norm_eps": 1e-5}
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "mistral": {**LLAMA, "model_type": "mistral", "rms_norm_eps": 1e-6}}


def published_tensors(kind: str, *, input_size: int = WIDTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors by the published names; matrices of a GPT-2-type memory lie [in, out]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.4

    tensors = {"lm_head.weight": draw(VOCAB, WIDTH)}
    if input_size != WIDTH:
        tensors |= {
            "embedding_transform.weight": draw(WIDTH, input_size),
            "embedding_transform.bias": draw(WIDTH),
        }
    for block in range(BLOCKS):
        if kind == "gpt2":
            name = f"h.{block}"
            tensors |= {
                f"{name}.ln_1.weight": 1 + draw(WIDTH),
                f"{name}.ln_1.bias": draw(WIDTH),
                f"{name}.mlp.c_fc.weight": draw(WIDTH, INNER),
                f"{name}.mlp.c_fc.bias": draw(INNER),
                f"{name}.mlp.c_proj.weight": draw(INNER, WIDTH),
                f"{name}.mlp.c_proj.bias": draw(WIDTH),
            }
        else:
            name = f"layers.{block}"
            tensors |= {
                f"{name}.input_layernorm.weight": 1 + draw(WIDTH),
                f"{name}.mlp.gate_proj.weight": draw(INNER, WIDTH),
                f"{name}.mlp.up_proj.weight": draw(INNER, WIDTH),
                f"{name}.mlp.down_proj.weight": draw(WIDTH, INNER),
            }
    if kind == "gpt2":
        return tensors | {"ln_f.weight": 1 + draw(WIDTH), "ln_f.bias": draw(WIDTH)}
    return tensors | {"norm.weight": 1 + draw(WIDTH)}


def save_published(
    root: Path,
    kind: str,
    tensors: dict[str, Any] | None = None,
    *,
    file: str = "model.safetensors",
    **changes: Any,
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({**CONFIGS[kind], **changes}))
    tensors = published_tensors(kind) if tensors is None else tensors
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / file)
    else:
        torch.save(tensors, root / file)
    return root


def expected_logits(kind: str, tensors: dict[str, torch.Tensor], inputs_ND: torch.Tensor) -> torch.Tensor:
    """Written from the published names alone, in float64: LayerNorm and tanh GELU, or RMSNorm and SwiGLU."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    epsilon = CONFIGS[kind].get("layer_norm_epsilon") or CONFIGS[kind]["rms_norm_eps"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if kind == "gpt2":
            centred = x - x.mean(-1, keepdim=True)
            scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
            return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weights[f"{name}.weight"]

    def gelu_new(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = inputs_ND.double()
    if "embedding_transform.weight" in weights:
        x = x @ weights["embedding_transform.weight"].T + weights["embedding_transform.bias"]
    for block in range(BLOCKS):
        if kind == "gpt2":
            mlp = f"h.{block}.mlp"
            up = norm(x, f"h.{block}.ln_1") @ weights[f"{mlp}.c_fc.weight"] + weights[f"{mlp}.c_fc.bias"]
            x = x + gelu_new(up) @ weights[f"{mlp}.c_proj.weight"] + weights[f"{mlp}.c_proj.bias"]
        else:
            mlp, inner = f"layers.{block}.mlp", norm(x, f"layers.{block}.input_layernorm")
            gate = inner @ weights[f"{mlp}.gate_proj.weight"].T
            up = inner @ weights[f"{mlp}.up_proj.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ weights[f"{mlp}.down_proj.weight"].T
    return norm(x, "ln_f" if kind == "gpt2" else "norm") @ weights["lm_head.weight"].T


@torch.no_grad()
def imported_logits(root: Path, inputs_ND: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    reference = open_reference(root)
    memory = Memory(MemoryConfig.from_dict(reference.memory))
    memory.load_state_dict(dict(reference.tensors()))
    memory.to(dtype)
    return memory.head(memory(inputs_ND.to(dtype)))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("input_size", [WIDTH, 24])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_the_published_memorys(kind: str, input_size: int, file: str, tmp_path: Path) -> None:
    tensors = published_tensors(kind, input_size=input_size)
    root = save_published(tmp_path / "published", kind, tensors, file=file)
    inputs_ND = torch.randn(50, input_size, generator=torch.Generator().manual_seed(1))
    wanted_NV = expected_logits(kind, tensors, inputs_ND)
    found_NV = imported_logits(root, inputs_ND)
    assert (found_NV - wanted_NV).abs().max() <= 1e-5 * wanted_NV.abs().max()
    # In bfloat16 every operation rounds to 8 bits: total variation of the distributions below 3e-2 here.
    rounded_NV = imported_logits(root, inputs_ND, torch.bfloat16).double().softmax(-1)
    assert 1e-5 < (rounded_NV - wanted_NV.softmax(-1)).abs().sum(-1).mean() / 2 < 3e-2


def test_weights_of_any_float_are_read(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors = {name: tensor.to(dtype) for name, tensor in published_tensors("gpt2").items()}
        root = save_published(tmp_path / str(dtype), "gpt2", tensors)
        found = dict(open_reference(root).tensors())
        assert torch.equal(found["final_norm.bias"], tensors["ln_f.bias"])


def test_shards_subdirectory_and_old_pickles(tmp_path: Path) -> None:
    tensors, inputs_ND = published_tensors("gpt2"), torch.randn(5, WIDTH)
    whole = imported_logits(save_published(tmp_path / "whole", "gpt2", tensors), inputs_ND)
    below = save_published(tmp_path / "joint" / "knn_generator", "gpt2", tensors)
    assert torch.equal(imported_logits(below.parent, inputs_ND), whole)
    old = save_published(tmp_path / "old", "gpt2", {}, file="pytorch_model.bin")
    torch.save(tensors, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(imported_logits(old, inputs_ND), whole)
    root, names = tmp_path / "shards", sorted(tensors)
    parts = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, part in parts.items():
        save_published(root, "gpt2", {name: tensors[name] for name in part}, file=file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(imported_logits(root, inputs_ND), whole)
    save_published(root, "gpt2", {name: tensors[name] for name in names[6:]}, file="model-2.safetensors")
    with pytest.raises(UserError, match=r"is in model-1.safetensors and again in model-2.safetensors"):
        open_reference(root)
    (root / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2.safetensors is missing"):
        open_reference(root)
    (root / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../whole/model.safetensors"}})
    )
    with pytest.raises(UserError, match="no weights file next to it"):
        open_reference(root)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_pickle_is_run(zipped: bool, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    root = save_published(tmp_path / "published", "gpt2", {}, file="pytorch_model.bin")
    tensors = {**published_tensors("gpt2"), "extra": _Hostile(trap)}
    torch.save(tensors, root / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="would run code, which is never done"):
        open_reference(root)
    assert not trap.exists()
    torch.load(root / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # the trap is real


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt2", drop("h.1.mlp.c_fc.bias"), "blocks.1.mlp.up.bias is missing"),
        ("gpt2", drop("lm_head.weight"), "lacks lm_head.weight"),
        ("llama", drop("layers.2.mlp.gate_proj.weight"), "blocks.2.mlp.gate.weight is missing"),
        (
            "llama",
            put("layers.7.input_layernorm.weight", torch.ones(WIDTH)),
            "numbered up to 7, but it has 4",
        ),
        ("llama", put("layers.0.self_attn.q_proj.weight", torch.ones(2, 2)), "no part of a memory"),
        ("gpt2", put("ln_f.bias", torch.ones(WIDTH + 1)), r"final_norm.bias is of shape \[17\], not \[16\]"),
        ("gpt2", put("embedding_transform.bias", torch.ones(WIDTH)), "input_projection.bias is one too many"),
        ("gpt2", put("ln_f.bias", torch.full((WIDTH,), float("nan"))), "not finite"),
        ("gpt2", put("ln_f.bias", torch.full((WIDTH,), 1e300, dtype=torch.float64)), "not finite"),
        ("gpt2", put("ln_f.bias", torch.ones(WIDTH, dtype=torch.int8)), "ln_f.bias is stored as I8"),
        ("llama", put("norm.weight", torch.ones(WIDTH).to(torch.float8_e4m3fn)), "is stored as F8_E4M3"),
    ],
)
def test_incomplete_and_foreign_tensors_are_refused(
    kind: str, change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    tensors = published_tensors(kind)
    change(tensors)
    root = save_published(tmp_path, kind, tensors)
    with pytest.raises(UserError, match=message):
        dict(open_reference(root).tensors())


def test_foreign_and_damaged_directories_are_refused(tmp_path: Path) -> None:
    cases: dict[str, Callable[[Path], object]] = {
        "does not exist": lambda root: None,
        "no config.json": lambda root: root.mkdir(),
        "config.json is not JSON": lambda root: (
            save_published(root, "gpt2") and (root / "config.json").write_text("{")
        ),
        "is not JSON .RecursionError|is not JSON .maximum": lambda root: (
            save_published(root, "gpt2") and (root / "config.json").write_text("[" * 100_000)
        ),
        "not a JSON object": lambda root: (
            save_published(root, "gpt2") and (root / "config.json").write_text("[]")
        ),
        "model_type is 'bert'": lambda root: save_published(root, "gpt2", model_type="bert"),
        "activation_function is 'relu'": lambda root: save_published(
            root, "gpt2", activation_function="relu"
        ),
        "layer_norm_epsilon is": lambda root: save_published(root, "gpt2", layer_norm_epsilon="x"),
        "it has neither": lambda root: (save_published(root, "gpt2") / "model.safetensors").unlink(),
        "cut short": lambda root: os.truncate(save_published(root, "gpt2") / "model.safetensors", 3000),
        "cannot be read": lambda root: os.truncate(
            save_published(root, "gpt2", file="pytorch_model.bin") / "pytorch_model.bin", 3000
        ),
        "holds dict, not names and dense tensors": lambda root: torch.save(
            {1: torch.ones(2)}, save_published(root, "gpt2", file="x.bin") / "pytorch_model.bin"
        ),
        "holds dict, not names and dense": lambda root: torch.save(
            {"lm_head.weight": torch.ones(2, 2).to_sparse()},
            save_published(root, "gpt2", file="x.bin") / "pytorch_model.bin",
        ),
        "stored as torch.int64": lambda root: torch.save(
            {"lm_head.weight": torch.ones(2, 2, dtype=torch.int64)},
            save_published(root, "gpt2", file="x.bin") / "pytorch_model.bin",
        ),
        "holds list": lambda root: torch.save(
            [1], save_published(root, "gpt2", file="x.bin") / "pytorch_model.bin"
        ),
    }
    for number, (message, make) in enumerate(cases.items()):
        make(tmp_path / str(number))
        with pytest.raises(UserError, match=message):
            open_reference(tmp_path / str(number))

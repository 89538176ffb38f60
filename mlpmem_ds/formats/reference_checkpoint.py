"""Read the memories that the method's authors publish: a Hugging Face directory of theirs → a plain memory's
tensors.

    DIR/config.json                                   a GPT-2, Llama or Mistral configuration
    DIR/model*.safetensors or pytorch_model*.bin      tensors; pickles are read with `weights_only`, so no
                                                      code runs

Their names and ours, GPT-2-type (LayerNorm, tanh GELU, Conv1D weights [in, out]) and Llama/Mistral-type
(RMSNorm, SwiGLU):

    embedding_transform.*                                  input_projection.*      (where input and width
                                                           differ)
    h.N.ln_1.*            layers.N.input_layernorm.*       blocks.N.norm.*
    h.N.mlp.c_fc.*        layers.N.mlp.{gate,up}_proj.*    blocks.N.mlp.{gate,up}.*
    h.N.mlp.c_proj.*      layers.N.mlp.down_proj.*         blocks.N.mlp.down.*
    ln_f.*                norm.*                           final_norm.*
    lm_head.*             lm_head.*                        head.*

Source: arXiv 2508.01832 and its public code (Binn0/MLPMemory at 5b04efb). Tensors are read one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.core.files import content_hash, sha256_of_file

SUBDIRECTORY = "knn_generator"
"""where their own save_pretrained of the joint model puts the memory"""
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_DTYPES = {"F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
_RULES = {
    "gelu": (
        (r"embedding_transform\.(weight|bias)", "input_projection.{0}", False),
        (r"h\.(\d+)\.ln_1\.(weight|bias)", "blocks.{0}.norm.{1}", False),
        (r"h\.(\d+)\.mlp\.c_fc\.(weight|bias)", "blocks.{0}.mlp.up.{1}", True),
        (r"h\.(\d+)\.mlp\.c_proj\.(weight|bias)", "blocks.{0}.mlp.down.{1}", True),
        (r"ln_f\.(weight|bias)", "final_norm.{0}", False),
        (r"lm_head\.(weight)", "head.{0}", False),
    ),
    "swiglu": (
        (r"embedding_transform\.(weight|bias)", "input_projection.{0}", False),
        (r"layers\.(\d+)\.input_layernorm\.(weight)", "blocks.{0}.norm.{1}", False),
        (r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight)", "blocks.{0}.mlp.{1}.{2}", False),
        (r"norm\.(weight)", "final_norm.{0}", False),
        (r"lm_head\.(weight)", "head.{0}", False),
    ),
}
_FAMILY = {"gpt2": "gelu", "llama": "swiglu", "mistral": "swiglu"}
# config field, the value that their code takes where it is missing, and the only values that our blocks
# compute
_ACTIVATION = {"gelu": ("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
               "swiglu": ("hidden_act", "silu", ("silu", "swish"))}  # fmt: skip
_EPSILON = {"gelu": ("layer_norm_epsilon", 1e-5), "swiglu": ("rms_norm_eps", 1e-6)}


@dataclass(frozen=True, kw_only=True)
class ReferenceMemory:
    """A published memory: its shape as a MemoryConfig's dict, and where each of our tensors lies."""

    root: Path
    memory: dict[str, Any]
    model_type: str
    sha256: str
    _places: Mapping[str, tuple[Path, str, bool]] = field(repr=False)
    """our name → (file, their name, whether it is stored transposed)"""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Our names and tensors, in the dtype of the file; only one at a time is in memory.

        Raises:
            UserError: a file is damaged, or a tensor is not finite.
        """
        with ExitStack() as stack:
            open_files = {
                path: _open(path, stack)
                for path in dict.fromkeys(place[0] for place in self._places.values())
            }
            for name, (path, theirs, transposed) in self._places.items():
                tensor = open_files[path].tensor(theirs)
                if not tensor.float().isfinite().all():  # as it will be used: float64 may hold larger ones
                    raise UserError(f"--from-reference {self.root}: {theirs} has numbers that are not finite")
                yield name, (tensor.T if transposed else tensor).contiguous()


def open_reference(root: Path) -> ReferenceMemory:
    """Look at a published memory: its kind, every tensor's name and shape. No weight is read yet.

    Raises:
        UserError: not such a memory, of a kind that is not known, incomplete, damaged, or with code in its
            pickle.
    """
    if not (root / "config.json").is_file() and (root / SUBDIRECTORY / "config.json").is_file():
        root = root / SUBDIRECTORY
    config = _read_config(root)
    model_type = str(config.get("model_type"))
    if model_type not in _FAMILY:
        raise _foreign(
            root, f"its model_type is {model_type!r}; memories of {', '.join(_FAMILY)} type are known"
        )
    family = _FAMILY[model_type]
    name, default, allowed = _ACTIVATION[family]
    if config.get(name, default) not in allowed:
        raise _foreign(root, f"its {name} is {config.get(name)!r}; the {family} blocks compute {allowed[0]}")
    shapes, places = _locate(root, family)
    epsilon_name, default_epsilon = _EPSILON[family]
    epsilon = config.get(epsilon_name, default_epsilon)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise _foreign(root, f"its {epsilon_name} is {epsilon!r}, not a small positive number")
    memory = {**_shape_of_memory(root, family, shapes), "norm_epsilon": epsilon}
    files = sorted({path for path, *_ in places.values()})
    sha256 = content_hash([memory, *((path.name, sha256_of_file(path)) for path in files)])
    return ReferenceMemory(root=root, memory=memory, model_type=model_type, sha256=sha256, _places=places)


def _foreign(root: Path, reason: str) -> UserError:
    return UserError(f"--from-reference {root} is not a published memory that can be read: {reason}")


def _read_config(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise UserError(f"--from-reference {root} does not exist: give the directory of a downloaded memory")
    if not (root / "config.json").is_file():
        raise _foreign(root, "it has no config.json")
    try:
        config = json.loads((root / "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise _foreign(root, f"config.json is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise _foreign(root, "config.json is not a JSON object")
    return config


# Files


def _weight_files(root: Path) -> list[Path]:
    """The weight files that Hugging Face would take, in its order of preference."""
    for single in _SINGLE:
        if (root / single).is_file():
            return [root / single]
        index = root / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
            except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
                raise _foreign(root, f"{index.name} is not an index of weights ({error!r})") from error
            for name in names:
                if Path(name).name != name or not name.endswith(Path(single).suffix):
                    raise _foreign(root, f"{index.name} names {name!r}, which is no weights file next to it")
                if not (root / name).is_file():
                    raise _foreign(root, f"{name} is missing: download it again")
            return [root / name for name in names]
    raise _foreign(root, f"it has neither {' nor '.join(_SINGLE)}, whole or in shards")


class _Safetensors:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def kinds(self) -> dict[str, tuple[tuple[int, ...], str]]:
        slices = {name: self._stream.get_slice(name) for name in self._stream.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}

    def tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._stream.get_tensor(name)
        return tensor


class _Pickle:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def kinds(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _open(path: Path, stack: ExitStack) -> _Safetensors | _Pickle:
    """A weights file whose tensors are read when asked for.

    Raises:
        UserError: damaged, or a pickle that would do more than hold tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _Safetensors(stack.enter_context(safe_open(path, framework="pt", device="cpu")))
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except Exception as error:  # safetensors, zip and pickle each raise a family of their own
        reason = first_line(error)
        raise UserError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}: {reason[:200]}): it is cut"
            " short, damaged, or a pickle that would run code, which is never done; download it again, or"
            " take a safetensors version"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for name, value in loaded.items()
    ):
        raise UserError(
            f"{path} holds {type(loaded).__name__}, not names and dense tensors: give a model's weights file"
        )
    return _Pickle(loaded)


# Names and shapes


def _locate(root: Path, family: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[Path, str, bool]]]:
    """(shape, place) of each of our tensors; every tensor of theirs must have a place."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[Path, str, bool]] = {}
    unknown: list[str] = []
    with ExitStack() as stack:
        for path in _weight_files(root):
            for theirs, (shape, dtype) in _open(path, stack).kinds().items():
                found = _translate(family, theirs)
                if found is None:
                    unknown.append(theirs)
                    continue
                ours, is_conv = found
                if dtype not in _DTYPES:
                    raise _foreign(root, f"{theirs} is stored as {dtype}: take weights in float16 to float64")
                if ours in places:
                    raise _foreign(root, f"{theirs} is in {places[ours][0].name} and again in {path.name}")
                transposed = is_conv and ours.endswith(".weight")
                shapes[ours] = shape[::-1] if transposed else shape
                places[ours] = (path, theirs, transposed)
    if unknown:
        raise _foreign(
            root, f"{len(unknown)} tensors are no part of a memory, the first is {sorted(unknown)[0]}"
        )
    return shapes, dict(sorted(places.items()))


def _translate(family: str, theirs: str) -> tuple[str, bool] | None:
    """(our name, whether it belongs to a Conv1D)."""
    for pattern, ours, is_conv in _RULES[family]:
        if match := re.fullmatch(pattern, theirs):
            return ours.format(*match.groups()), is_conv
    return None


def _shape_of_memory(root: Path, family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The memory's configuration from its tensors' shapes; every tensor that it needs is there, of the right
    shape."""
    blocks = {int(match.group(1)) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    head, up = shapes.get("head.weight", ()), shapes.get("blocks.0.mlp.up.weight", ())
    if len(head) != 2 or len(up) != 2:
        raise _foreign(root, "it lacks lm_head.weight or the first block's MLP")
    if blocks != set(range(len(blocks))):
        raise _foreign(root, f"its blocks are numbered up to {max(blocks)}, but it has {len(blocks)}")
    vocab_size, hidden = head
    inner, projection = up[0], shapes.get("input_projection.weight")
    expected: dict[str, tuple[int, ...]] = {
        "head.weight": (vocab_size, hidden),
        "final_norm.weight": (hidden,),
    }
    norm_parts = ("weight", "bias") if family == "gelu" else ("weight",)
    if family == "gelu":
        expected["final_norm.bias"] = (hidden,)
    for block in range(len(blocks)):
        prefix = f"blocks.{block}"
        expected |= {f"{prefix}.norm.{part}": (hidden,) for part in norm_parts}
        expected |= {f"{prefix}.mlp.up.weight": (inner, hidden), f"{prefix}.mlp.down.weight": (hidden, inner)}
        if family == "gelu":
            expected |= {f"{prefix}.mlp.up.bias": (inner,), f"{prefix}.mlp.down.bias": (hidden,)}
        else:
            expected[f"{prefix}.mlp.gate.weight"] = (inner, hidden)
    if projection is not None:
        expected |= {"input_projection.weight": (hidden, projection[-1]), "input_projection.bias": (hidden,)}
    faults = [
        f"{name} is"
        f" {'missing' if name not in shapes else f'of shape {list(shapes[name])}, not {list(shape)}'}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ] + [f"{name} is one too many" for name in shapes if name not in expected]
    if faults:
        raise _foreign(root, f"{len(faults)} tensors do not fit, the first: {faults[0]} (by our names)")
    return {
        "input_size": hidden if projection is None else projection[-1],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_blocks": len(blocks),
        "vocab_size": vocab_size,
        "family": family,
    }

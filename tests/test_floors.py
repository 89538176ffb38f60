"""Who may import whom: floors, owners of heavy libraries, no cycles, and what travels with an exported model.

Every import counts, also one inside a function, under TYPE_CHECKING, or by `import_module`.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# floor, from the ground up → the libraries that its files may import, besides Python's own
FLOORS = {
    "core": {"numpy", "fsspec", "tqdm"},
    "maths": {"numpy", "torch", "triton"},
    "formats": {"numpy", "torch", "safetensors", "zstandard", "pyarrow", "datasets"},
    "models": {"numpy", "torch", "safetensors", "transformers"},
    "engines": {
        "numpy", "torch", "accelerate", "datasets", "datasketch", "deepspeed", "faiss", "gguf", "lm_eval",
        "huggingface_hub", "matplotlib", "mpi4py", "peft", "bm25s", "rich", "tokenizers", "transformers",
        "webdataset",
    },
    "serving": {"torch", "transformers", "vllm"},
    "stages": {"numpy", "torch", "safetensors", "tokenizers", "transformers", "wandb"},
    "benchmarks": {
        "numpy", "torch", "faiss", "pyarrow", "pytest", "tokenizers", "transformers", "zstandard",
    },
}  # fmt: skip
ORDER = list(FLOORS)
# library → the files that may import it, whatever their floor allows
OWNERS: dict[str, set[str]] = {
    "accelerate": {"engines/hidden_states.py"},
    "datasets": {"engines/lm_eval.py", "engines/suite_tasks.py", "formats/saved_datasets.py"},
    "datasketch": {"engines/minhash.py"},
    "deepspeed": {"engines/deepspeed/library.py"},
    "faiss": {"engines/faiss_library.py"},
    "fsspec": {"core/objects/store.py"},
    "gguf": {"engines/gguf.py"},
    "huggingface_hub": {"engines/model_cards.py"},
    "lm_eval": {"engines/lm_eval.py", "engines/suite_tasks.py"},
    "bm25s": {"engines/passage_index.py"},
    "peft": {"engines/adapters.py"},
    "matplotlib": {"engines/plotting.py"},
    "mpi4py": {"engines/collectives/mpi.py"},
    "rich": {"engines/terminal.py"},
    "pyarrow": {"formats/arrow_library.py"},
    "torch.distributed": {"engines/processes.py"},
    "torch.utils.tensorboard": {"stages/training/metrics.py"},
    "tqdm": {"core/log.py"},
    "triton": {
        "maths/kernels/sparse_rows.py",
        "maths/kernels/list_candidates.py",
        "maths/kernels/probability_rows.py",
    },
    "vllm": {f"serving/vllm_{name}.py" for name in ("model", "plugin", "requests", "slots")},
    "wandb": {"stages/training/metrics.py"},
    "webdataset": {"engines/webdataset_stream.py"},  # `train --loader webdataset`; a format that others read
    "zstandard": {"formats/streams.py", "formats/target_shards.py"},
    # Hugging Face models and tokenizers are the project's subject; these are the files that make or read one.
    "safetensors": {
        "formats/gates.py",
        "formats/reference_checkpoint.py",
        "formats/trained_models.py",
        "formats/weight_shards.py",
        "models/pretrained_memory.py",
        "stages/conversion/weights.py",
        "stages/training/base_files.py",
        "stages/training/initial_memory.py",
    },
    "tokenizers": {
        "engines/model_files.py",
        "engines/text_backend.py",
        "stages/corpus/corpus_tokenizer.py",
        "stages/evaluation/token_kinds.py",
    },
    "transformers": {
        "engines/adapters.py",
        "engines/gguf.py",
        "engines/hidden_states.py",
        "engines/model_files.py",
        "engines/chat_template.py",
        "engines/model_kinds.py",
        "engines/tokenizer_loading.py",
        "engines/deepspeed/sharded_base.py",
        "models/backbone.py",
        "models/base_loading.py",
        "models/carried_layers.py",
        "models/final_norm.py",
        "models/generation_settings.py",
        "models/hf.py",
        "models/hf_config.py",
        "models/joint_forward.py",
        "models/joint_parts.py",
        "models/kept_card.py",
        "models/quantized_base.py",
        "models/shape.py",
        "models/structure.py",
        "serving/transformers_serve.py",
        "stages/base/decoder_training.py",
        "stages/base/model.py",
        "stages/base/objective.py",
        "stages/baseline/bigger_model.py",
        "stages/baseline/low_rank.py",
        "stages/baseline/train_baseline.py",
        "stages/conversion/check.py",
        "stages/conversion/convert_checkpoint.py",
        "stages/conversion/import_reference.py",
        "stages/conversion/joining.py",
        "stages/corpus/corpus_tokenizer.py",
        "stages/evaluation/samples.py",
        "stages/exchange/import_datastore.py",
        "stages/generation/exported_model.py",
        "stages/generation/generate.py",
        "stages/generation/text.py",
        "stages/harness/grid_scores.py",
        "stages/harness/run_lm_eval.py",
        "stages/questions/answering.py",
        "stages/training/base_files.py",
    },
}
# `models/hf.py` and all that it imports are copied into every export: no other file may be among them.
EXPORTED = {
    "models/backbone.py",
    "models/capture_point.py",
    "models/carried_layers.py",
    "models/forward_docs.py",
    "models/gate_features.py",
    "models/gates.py",
    "models/hf.py",
    "models/hf_config.py",
    "models/history_cache.py",
    "models/joint_forward.py",
    "models/joint_parts.py",
    "models/joint_step.py",
    "models/kept_card.py",
    "models/logit_transform.py",
    "models/memory.py",
    "models/memory_config.py",
    "models/mixture.py",
    "models/pretrained_memory.py",
    "models/quantized.py",
    "models/quantized_base.py",
    "models/shared_head.py",
    "models/structure.py",
    "models/window_cache.py",
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name → file, for the package under `root`."""
    names = {}
    for path in sorted((root / "mlpmem_ds").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, root: Path) -> list[tuple[str, ...]]:
    """Every import of a file, each as the names that it may be: `from a import b` is a.b, or a."""
    return imports_of(path.read_text(encoding="utf-8"), path.relative_to(root).parts[:-1])


@functools.cache
def imports_of(source: str, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{module}.{alias.name}", module) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            text = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found.append((text.value.rstrip("."),))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.append(("torch.distributed",))
    return found


def own_imports(root: Path) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports."""
    names = modules(root)
    graph: dict[str, set[str]] = {}
    for module, path in names.items():
        found = (next((name for name in choice if name in names), None) for choice in imports(path, root))
        graph[module] = {name for name in found if name not in (None, "mlpmem_ds")}
    return graph


def floor_violations(root: Path) -> list[str]:
    """Imports from a floor above, or of a top-level module (commands), which is above all floors.

    Benchmarks may call commands, as a user does; no floor imports a benchmark.
    """
    found = []
    for module, path in modules(root).items():
        if module.count(".") == 0 or path.parent == root / "mlpmem_ds":
            continue
        floor = module.split(".")[1]
        for choice in imports(path, root):
            parts = choice[0].split(".")
            if parts[0] != "mlpmem_ds" or len(parts) < 2 or parts[1].startswith("__"):
                continue
            if floor == "benchmarks" and parts[1] == "commands":
                continue
            if parts[1] not in ORDER or ORDER.index(parts[1]) > ORDER.index(floor):
                found.append(f"{module} imports {choice[0]}, a floor above its own")
    return sorted(set(found))


def library_violations(root: Path) -> list[str]:
    """Imports of a library that the floor does not have, or that belongs to another file."""
    found = []
    for module, path in modules(root).items():
        name = path.relative_to(root / "mlpmem_ds").as_posix()
        floor = name.split("/")[0]
        for choice in imports(path, root):
            library = choice[0].split(".")[0]
            if library in sys.stdlib_module_names or library in ("mlpmem_ds", "__future__"):
                continue
            if floor in FLOORS and library not in FLOORS[floor]:
                found.append(f"{module} imports {library}, which no file of {floor} may import")
            if floor == "benchmarks":  # which compare us with what a library's user would write
                continue
            owned = [key for key in OWNERS if choice[0] == key or choice[0].startswith(f"{key}.")]
            found += [
                f"{module} imports {key}, which belongs to {sorted(OWNERS[key])}"
                for key in owned
                if name not in OWNERS[key]
            ]
    return sorted(set(found))


def unused_owners(root: Path) -> list[str]:
    """Entries of OWNERS for a file that no longer imports the library: the list must shrink with the code."""
    found = []
    for library, names in OWNERS.items():
        for name in sorted(names):
            path = root / "mlpmem_ds" / name
            taken = {choice[0] for choice in imports(path, root)} if path.is_file() else set()
            if not any(one == library or one.startswith(f"{library}.") for one in taken):
                found.append(f"{name} is listed as an owner of {library} and does not import it")
    return found


def import_cycles(root: Path) -> list[str]:
    """Modules that import each other, at the top or inside a function."""
    graph = own_imports(root)
    cycles = set()
    for start in graph:
        reached, pending = set[str](), [start]
        while pending:
            for name in graph.get(pending.pop(), ()):
                if name not in reached:
                    reached.add(name)
                    pending.append(name)
        if start in reached:
            cycles.add(start)
    return [
        f"{module} imports itself by way of {sorted(graph[module] & cycles)}" for module in sorted(cycles)
    ]


def export_violations(root: Path) -> list[str]:
    """What `models/hf.py` reaches must be in EXPORTED: these files are copied next to each exported model."""
    graph, names = own_imports(root), modules(root)
    reached, pending = set[str](), ["mlpmem_ds.models.hf"]
    while pending:
        module = pending.pop()
        if module in names and module not in reached:
            reached.add(module)
            pending += graph[module]
    files = {names[module].relative_to(root / "mlpmem_ds").as_posix() for module in reached}
    return [f"{name} would travel with exported models" for name in sorted(files - EXPORTED)]


RULES: list[Callable[[Path], list[str]]] = [
    floor_violations,
    library_violations,
    import_cycles,
    export_violations,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


def test_no_library_is_listed_for_a_file_that_does_not_import_it() -> None:
    assert unused_owners(ROOT) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("maths/planted.py", "from mlpmem_ds.stages import train"),
        ("core/planted.py", "import mlpmem_ds.formats.corpus"),
        ("core/planted.py", "from mlpmem_ds import formats"),
        ("formats/planted.py", "from ..engines.faiss import search"),
        ("models/planted.py", "def late():\n    from mlpmem_ds.engines import faiss"),
        ("stages/planted.py", "from mlpmem_ds import commands"),
        ("stages/index/planted.py", "from mlpmem_ds.commands import folder"),
        ("stages/index/planted.py", "from mlpmem_ds.benchmarks.bench import main"),
    ],
)
def test_an_import_from_a_floor_above_is_found(tmp_path: Path, name: str, line: str) -> None:
    plant(tmp_path, name, line)
    assert len(floor_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("maths/planted.py", "import triton.language as tl"),
        ("stages/planted.py", "def late():\n    from faiss import read_index"),
        ("stages/planted.py", "import torch.distributed as dist"),
        ("stages/planted.py", "from torch import distributed"),
        ("stages/planted.py", "import torch\n\ndef late():\n    torch.distributed.barrier()"),
        ("engines/planted.py", "import importlib\n\nimportlib.import_module('deepspeed.utils')"),
        ("formats/planted.py", "from importlib import import_module\n\nimport_module(f'pyarrow.{name}')"),
        ("engines/planted.py", "from transformers import AutoModel"),
        ("maths/planted.py", "from scipy import special"),
        ("core/planted.py", "import torch"),
        ("planted.py", "import webdataset"),
    ],
)
def test_an_import_of_a_library_that_belongs_to_another_file_is_found(
    tmp_path: Path, name: str, line: str
) -> None:
    plant(tmp_path, name, line)
    assert {violation.split()[0] for violation in library_violations(tmp_path)} == {
        "mlpmem_ds." + name.removesuffix(".py").replace("/", ".")
    }


def test_a_cycle_is_found_also_if_it_is_closed_inside_a_function(tmp_path: Path) -> None:
    plant(tmp_path, "core/one.py", "from mlpmem_ds.core.two import f")
    plant(tmp_path, "core/two.py", "from .three import f")
    plant(tmp_path, "core/three.py", "from mlpmem_ds.core import four")
    plant(tmp_path, "core/four.py", "")
    assert import_cycles(tmp_path) == []
    plant(tmp_path, "core/three.py", "def late():\n    from mlpmem_ds.core import one")
    assert len(import_cycles(tmp_path)) == 3


@pytest.mark.parametrize(
    "line", ["from mlpmem_ds.core.errors import UserError", "from .objective import loss"]
)
def test_a_file_that_would_travel_with_an_export_is_found(tmp_path: Path, line: str) -> None:
    plant(tmp_path, "core/errors.py", "")
    plant(tmp_path, "models/objective.py", "")
    plant(tmp_path, "models/hf.py", "from .memory import Memory")
    plant(tmp_path, "models/memory.py", line)
    assert len(export_violations(tmp_path)) == 1


def plant(root: Path, name: str, text: str) -> None:
    path = root / "mlpmem_ds" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

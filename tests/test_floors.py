"""The floors: a file imports only from floors below its own, and a heavy library has one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("core", "maths", "formats", "models", "engines", "stages")
# library → the only files that may import it
OWNERS = {
    "faiss": {"engines/faiss.py"},
    "deepspeed": {"engines/deepspeed.py"},
    "matplotlib": {"engines/plotting.py"},
    "triton": {"maths/kernels/sparse_rows.py", "maths/kernels/probability_rows.py"},
}
# What travels with an exported model imports nothing of ours but its neighbours.
EXPORTED = (
    "models/memory.py",
    "models/mixture.py",
    "models/backbone.py",
    "models/quantized.py",
    "models/hf.py",
)


def imported_modules(source: str, package: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from (
                [f"{module}.{alias.name}" for alias in node.names] if module == "mlpmem_ds" else [module]
            )


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "mlpmem_ds").rglob("*.py")):
        relative = path.relative_to(root / "mlpmem_ds")
        if len(relative.parts) == 1:
            continue
        floor, name = relative.parts[0], relative.as_posix()
        for module in imported_modules(path.read_text(), ("mlpmem_ds", *relative.parts[:-1])):
            parts = module.split(".")
            library = parts[0]
            if library == "mlpmem_ds" and len(parts) > 1 and parts[1] in FLOORS:
                if FLOORS.index(parts[1]) > FLOORS.index(floor):
                    found.append(f"{name} imports {module}, a floor above its own")
                if name in EXPORTED and parts[1] != "models":
                    found.append(f"{name} imports {module}, but travels with exported models")
            if library in OWNERS and name not in OWNERS[library]:
                found.append(f"{name} imports {library}, which belongs to {sorted(OWNERS[library])}")
            if floor == "maths" and library in ("transformers", "webdataset", "zstandard"):
                found.append(f"{name} imports {library}; maths is torch and numpy")
    return found


def test_every_file_keeps_to_its_floor() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("maths/planted.py", "from mlpmem_ds.stages import train"),
        ("core/planted.py", "import mlpmem_ds.formats.corpus"),
        ("core/planted.py", "from mlpmem_ds import formats"),
        ("formats/planted.py", "from ..engines.faiss import search"),
        ("maths/planted.py", "import triton.language as tl"),
        ("stages/planted.py", "def late():\n    import deepspeed"),
        ("models/memory.py", "from mlpmem_ds.core.errors import UserError"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, line: str) -> None:
    path = tmp_path / "mlpmem_ds" / name
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(violations(tmp_path)) == 1

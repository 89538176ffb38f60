"""What `--control NAME=DIR` names: a memory, which is mixed with the base, or a language model alone."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json_object
from mlpmem_ds.core.manifest import format_of
from mlpmem_ds.formats.trained_models import MemoryManifest
from mlpmem_ds.stages.evaluation.config import Config, control_directories


def memory_controls(config: Config) -> dict[str, Path]:
    """Name → directory of the controls that are memories."""
    return {
        name: root for name, root in control_directories(config.control).items() if _is_memory(name, root)
    }


def model_controls(config: Config) -> dict[str, Path]:
    """Name → directory of the controls that are language models."""
    controls = control_directories(config.control)
    return {name: root for name, root in controls.items() if not _is_memory(name, root)}


def _is_memory(name: str, root: Path) -> bool:
    """Whether a directory is a training output or an exported memory.

    Raises:
        UserError: it is neither that nor a language model.
    """
    if format_of(root) == MemoryManifest.FORMAT:
        return True  # finished or not: reading it says which
    if not (root / "config.json").is_file():
        raise UserError(
            f"--control {name}: {root} holds neither a memory nor a language model: give an output of"
            " launch/train.py, an exported memory, or a Hugging Face model directory"
        )
    return is_export(root)


def is_export(root: Path) -> bool:
    """Whether a directory is an exported model, base and memory in one."""
    config = root / "config.json"
    return config.is_file() and read_json_object(config).get("model_type") == "mlpmem"

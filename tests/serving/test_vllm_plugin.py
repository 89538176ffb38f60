"""What vLLM calls: the joint model is registered by name, once, and nothing of vLLM is imported before."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig

from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.serving.vllm_plugin import register

ROOT = Path(__file__).parents[2]


def test_the_joint_model_is_registered_by_name_also_when_called_again(vllm: SimpleNamespace) -> None:
    register()
    register()
    assert list(vllm.registry.models) == ["MemoryAugmentedLM"]
    module, _, name = vllm.registry.models["MemoryAugmentedLM"].partition(":")
    assert getattr(import_module(module), name) is vllm.vllm_model.MemoryAugmentedLM
    assert AutoConfig.for_model("mlpmem").model_type == "mlpmem"


def test_the_name_is_that_in_exports(vllm: SimpleNamespace) -> None:
    assert vllm.vllm_model.MemoryAugmentedLM.__name__ == MemoryAugmentedLM.__name__


def test_the_distribution_has_the_entry_point() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        '[project.entry-points."vllm.general_plugins"]\nmlpmem = "mlpmem_ds.serving.vllm_plugin:register"'
        in text
    )
    # Model Runner V2 would refuse to start.
    assert "vllm.logits_processors" not in text


def test_the_plugin_itself_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, mlpmem_ds.serving.vllm_plugin\n"
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr

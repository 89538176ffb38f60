"""The joint model saved and loaded again: by this package, and by a process that does not have it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM

from ..joint_models import joined
from .conftest import BASES, EOS, VOCAB, WIDTH, random_ids, tiny_base, tiny_memory


def export(family: str, directory: Path) -> MemoryAugmentedLM:
    joint = joined(
        tiny_base(family),
        tiny_memory(),
        lmbda=0.4,
        input_point=CapturePoint(layer=-2),
        provenance={"corpus": "tiny", "temperature": 3.5},
        vocabulary_sha256="ab12",
    )
    joint.save_pretrained(directory)
    return joint


@pytest.mark.parametrize("family", BASES)
def test_round_trip_inside_the_package(family: str, tmp_path: Path) -> None:
    joint, ids_BS = export(family, tmp_path), random_ids()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MemoryAugmentedLM and not any(report.values()), report
    assert torch.equal(loaded(ids_BS).logits, joint(ids_BS).logits)
    tied = joint.base.config.tie_word_embeddings
    for model in (joint, loaded):
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head.data_ptr() == embeddings.data_ptr()) == tied
    config = loaded.config
    assert (config.lmbda, config.input_layer, config.input_point) == (0.4, 2, "ffn_input")
    assert config.provenance == {"corpus": "tiny", "temperature": 3.5} and config.vocabulary_sha256 == "ab12"
    assert loaded.generation_config.eos_token_id == EOS
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, WIDTH, 4)
    loaded.lmbda = 0.7
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").lmbda == 0.7
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.base.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


CODE_FILES = (
    "hf.py",
    "hf_config.py",
    "forward_docs.py",
    "joint_forward.py",
    "joint_parts.py",
    "joint_step.py",
    "kept_card.py",
    "history_cache.py",
    "pretrained_memory.py",
    "gates.py",
    "gate_features.py",
    "mixture.py",
    "memory.py",
    "memory_config.py",
    "backbone.py",
    "capture_point.py",
    "structure.py",
    "quantized.py",
    "quantized_base.py",
)
STRANGER = """
import json, sys
sys.modules["mlpmem_ds"] = None  # any import of the package is an ImportError from here on
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
result = {}
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    new = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        result[directory] = {"logits": model(ids).logits.double().tolist(), "new": new.tolist(),
            "lmbda": model.lmbda}
    model.save_pretrained(directory + "-again")
    again = AutoModelForCausalLM.from_pretrained(directory + "-again", trust_remote_code=True)
    assert torch.equal(again(ids).logits, model(ids).logits)
assert not any(name.startswith("mlpmem_ds.") for name in sys.modules)
print(json.dumps(result))
"""


def test_an_export_loads_and_generates_without_this_package(tmp_path: Path) -> None:
    ids_BS = random_ids()
    families = ("gpt2", "llama")
    joints = {family: export(family, tmp_path / family) for family in families}
    assert {*CODE_FILES, "model.safetensors"} <= {file.name for file in (tmp_path / "gpt2").iterdir()}
    environment = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            STRANGER,
            json.dumps(ids_BS.tolist()),
            *(str(tmp_path / name) for name in families),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for family, joint in joints.items():
        seen = result[str(tmp_path / family)]
        torch.testing.assert_close(
            torch.tensor(seen["logits"], dtype=torch.float64),
            joint(ids_BS).logits.double(),
            rtol=1e-6,
            atol=1e-6,
        )
        expected = joint.generate(ids_BS, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert seen["new"] == expected.tolist() and seen["lmbda"] == 0.4

"""The base's output head, lent to a memory that has none of its own: in training and all that follows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import TransformersSource
from mlpmem_ds.formats.evaluation import open_report
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.models.base_end import BaseEnd
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.hf import MemoryAugmentedLM, load_memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.mixture import Weights
from mlpmem_ds.models.shared_head import head_fingerprint
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.conversion import convert_checkpoint
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.inputs import open_inputs
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.training.base_files import open_base_files
from mlpmem_ds.stages.training.base_start import fingerprint_of_head
from mlpmem_ds.stages.training.initial_memory import InitialMemory
from mlpmem_ds.stages.training.lent_head import check_initial_head, lender_of

from ...models.families import tiny_base

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_base("phi").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_running_bases_own_or_read_from_its_files(base: str, dtype: torch.dtype) -> None:
    running = TransformersSource(base, dtype="bfloat16")
    lender = lender_of(base, device=CPU, dtype=dtype, running=running, base_end=None)
    expected_VD, expected_V = output_head(tiny_base("phi"))
    with lender() as (weight_VD, bias_V):
        is_own = weight_VD.data_ptr() == output_head(running.model)[0].data_ptr()
        assert is_own == (dtype == torch.bfloat16)  # in another dtype it would be rounded
        assert torch.equal(weight_VD, expected_VD.to(dtype))
        assert expected_V is not None and bias_V is not None and torch.equal(bias_V, expected_V.to(dtype))
        assert not weight_VD.requires_grad
    end = BaseEnd(weight_VD=expected_VD, bias_V=expected_V)
    with lender_of(base, device=CPU, dtype=dtype, running=None, base_end=end)() as (weight_VD, _):
        assert weight_VD is expected_VD  # the objective holds it already


def test_a_memory_without_a_head_is_trained_on_with_its_base_alone(base: str, tmp_path: Path) -> None:
    shape = MemoryConfig(input_size=32, hidden_size=32, intermediate_size=4, num_blocks=1, vocab_size=61)
    own = InitialMemory(root=tmp_path, memory=shape, vocabulary_sha256=None, _places={})
    check_initial_head(own, None)
    shared = replace(shape, shared_head=fingerprint_of_head(open_base_files(base)))
    check_initial_head(replace(own, memory=shared), base)
    with pytest.raises(UserError, match="uses its base's: give that base with --model"):
        check_initial_head(replace(own, memory=shared), None)
    other = replace(own, memory=replace(shared, shared_head="another"))
    with pytest.raises(UserError, match="has another head: give the base of that memory"):
        check_initial_head(other, base)


@pytest.fixture(scope="module")
def runs(make_runs: Any, corpus_dir: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("lent-keys")
    config = extract_keys.Config(
        model=str(base_dir),
        corpus=corpus_dir,
        output=root / "stored",
        input_layer=(-1,),
        input_point="layer_output",
        unit_positions=256,
    )
    extract_keys.run(config, World())
    extract_keys.run(replace(config, output=root / "online", input_codec="none"), World())
    flags = {
        "corpus": corpus_dir,
        "keys": root / "stored",
        "model": base_dir,
        "validate_every": None,
        "alpha": 0.0,
        "start": "base",
        "num_blocks": 2,
        "epochs": 1.0,
        "batch_positions": 192,
        "log_every_steps": 1,
        "save_every_steps": 2,
    }
    runs, online = make_runs(flags), {"keys": root / "online", "head": "frozen"}
    runs.succeed(
        runs.start("one", 2),
        runs.start("one-frozen", 2, head="frozen"),
        runs.start("two-frozen", 3, head="frozen", signal_at=1, size=2),
        runs.start("two-frozen", 3, head="frozen", size=2),
        runs.start("one-frozen-online", 2, **online),
        runs.start("two-frozen-online", 3, base_sharding="zero3", size=2, **online),
    )
    return runs


def test_a_frozen_head_is_the_bases_and_is_not_stored(runs: Any, base_dir: Path) -> None:
    head_VD, _ = output_head(load_base(str(base_dir), dtype=torch.float32, device="cpu"))
    for name in ("one-frozen", "two-frozen", "one-frozen-online", "two-frozen-online"):
        trained = read_weights(runs / name)
        shape = MemoryConfig.from_dict(trained.memory)
        assert trained.provenance.head == "frozen" and shape.shared_head == head_fingerprint(head_VD)
        assert not [name for name in trained.weights if name.startswith("head.")]
        assert trained.weights["blocks.0.mlp.down.weight"].abs().max() > 0
        numbers = sum(tensor.numel() for tensor in trained.weights.values())
        assert numbers == trained.provenance.parameters == shape.num_parameters()
        assert shape.num_shared_parameters() == head_VD.numel()
    np.testing.assert_allclose(runs.losses("two-frozen"), runs.losses("one-frozen"), rtol=1e-5)
    np.testing.assert_allclose(runs.losses("two-frozen-online"), runs.losses("one-frozen-online"), rtol=1e-5)
    assert runs.losses("one-frozen")[0] == runs.losses("one")[0]
    assert runs.losses("one-frozen")[-1] > runs.losses("one")[-1]


def test_a_memory_with_a_frozen_head_goes_through_every_stage(
    runs: Any, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    """Training, its checkpoint, evaluation, an export of a bank of two, and what is trained from one."""
    first, second = runs / "one-frozen", runs / "two-frozen"
    config = evaluate.Config(
        model=str(base_dir),
        corpus=corpus_dir,
        memory=(f"a={first}", f"b={second}"),
        output=tmp_path / "report",
        bootstrap_samples=100,
    )
    evaluate.run(config, World())
    arms = {arm.name: arm for arm in open_report(tmp_path / "report").evaluation.arms}
    samples = open_report(tmp_path / "report").evaluation.samples
    assert len(samples) == config.samples and all(sample.memory for sample in samples)
    shape = MemoryConfig.from_dict(read_weights(first).memory)
    for name in ("base+a", "base+b"):
        assert arms[name].parameters - arms["base"].parameters == shape.num_parameters()
        assert "its output head is the base's own" in arms[name].description
    export = convert_checkpoint.Config(
        checkpoint=(first, second), model=str(base_dir), output=tmp_path / "export", lmbda=1.0
    )
    convert_checkpoint.run(export, World())
    card = (tmp_path / "export" / "README.md").read_text()
    assert "its output head is the base's own, which is not counted" in card
    convert_checkpoint.run(
        replace(export, checkpoint=(first,), output=tmp_path / "step", step=6, dtype="bfloat16"), World()
    )
    joint = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert not [name for name in joint.state_dict() if "memor" in name and ".head." in name]
    base = load_base(str(base_dir), dtype=torch.float32, device="cpu")
    bank = MemoryAugmentedLM.from_pretrained(base, [load_memory(first), load_memory(second)], lmbda=1.0)
    ids_BS = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(joint(ids_BS).logits, bank(ids_BS).logits, rtol=1e-5, atol=1e-5)

    (subject,) = open_inputs(config, World()).playing("subject")
    mixed = subject.joint_model(0.9, {"lambda_a": 0.6, "lambda_b": 0.3})
    bank.set_gate(Weights((0.6, 0.3)))
    with torch.no_grad():
        torch.testing.assert_close(mixed(ids_BS).logits, bank(ids_BS).logits, rtol=1e-5, atol=1e-5)

    further = {"start": "random", "init_from": first, "num_blocks": None}
    runs.refuse("give that base with --model", "wrong", 2, model=None, **further)
    runs.succeed(runs.start("further", 2, **further))
    assert read_weights(runs / "further").memory == read_weights(first).memory
    assert abs(runs.losses("further")[0] / runs.losses("one-frozen")[-1] - 1) < 0.2

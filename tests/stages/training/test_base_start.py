"""A memory that starts as its base gives the base's distribution before the first step, for every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.batches import BatchReader
from mlpmem_ds.formats.evaluation import open_report
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.models.backbone import capture
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM, load_memory
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.objective import MemoryWithLoss
from mlpmem_ds.models.past_states import with_past
from mlpmem_ds.models.quantized import quantize_linears
from mlpmem_ds.models.structure import UnknownStructureError
from mlpmem_ds.stages.conversion import convert_checkpoint
from mlpmem_ds.stages.evaluation import evaluate
from mlpmem_ds.stages.evaluation.arms.memory import memory_scores
from mlpmem_ds.stages.keys import extract_keys
from mlpmem_ds.stages.training.base_files import open_base_files
from mlpmem_ds.stages.training.base_start import head_start, whole_start

from ...conftest import VOCAB_SIZE
from ...models.families import BASES, tiny_base

LAYERS = 3
BATCH = 192
LAST = CapturePoint(layer=-1, point="layer_output")
FINAL = CapturePoint(layer=-1, point="final_norm")
CAN_START_AT_NORM_ONLY = {"opt_post_norm"}  # a matrix stands between its layers and its head


def started(path: Path, point: CapturePoint, *, family: str = "gelu", input_size: int = 0) -> Memory:
    """A memory as `train --start base` makes it."""
    start = whole_start(open_base_files(str(path)), point, num_layers=LAYERS)
    vocab_size, width = start.head_shape
    input_size = input_size or width
    config = MemoryConfig(
        input_size=input_size,
        hidden_size=width,
        intermediate_size=40,
        num_blocks=2,
        vocab_size=vocab_size,
        family=family,
        **start.fields,
    )
    torch.manual_seed(0)
    memory = MemoryWithLoss(config, alpha=0.5)
    start.check_fits(vocab_size=vocab_size, hidden_size=width, input_size=input_size)
    for name, read in start.parameters(config).items():
        memory.get_parameter(name).data.copy_(read())
    plain = Memory(MemoryConfig.from_dict(config.to_dict()))
    plain.load_state_dict(memory.state_dict())
    assert sum(tensor.numel() for tensor in plain.state_dict().values()) == config.num_parameters()
    return plain.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def keys_of(corpus_dir: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Point of the last layer → keys whose inputs were read there."""
    root = tmp_path_factory.mktemp("start-keys")
    for point in ("layer_output", "final_norm", "ffn_input"):
        config = extract_keys.Config(
            model=str(base_dir),
            corpus=corpus_dir,
            output=root / point,
            input_layer=(-1,),
            input_point=point,
            unit_positions=256,
        )
        extract_keys.run(config, World())
    config = replace(config, output=root / "depths", input_layer=(0, -1), input_point="layer_output")
    extract_keys.run(config, World())
    extract_keys.run(replace(config, output=root / "online", input_codec="none"), World())
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def runs(make_runs: Any, corpus_dir: Path, base_dir: Path, keys_of: dict[str, Path]) -> Any:
    flags = {
        "corpus": corpus_dir,
        "keys": keys_of["layer_output"],
        "model": base_dir,
        "validate_every": None,
        "alpha": 0.0,
        "start": "base",
        "num_blocks": 2,
        "epochs": 1.0,
        "batch_positions": BATCH,
        "log_every_steps": 1,
        "save_every_steps": 2,
    }
    runs = make_runs(flags)
    runs.succeed(
        runs.start("one", 2),
        runs.start("one-norm", 2, keys=keys_of["final_norm"]),
        runs.start("stopped", 3, signal_at=1, size=2),
        runs.start("stopped", 3, size=2),
        runs.start("two", 3, size=2),
        runs.start("one-depths", 2, keys=keys_of["depths"], validate_every=2, order="blocks"),
        runs.start("one-online", 2, keys=keys_of["online"]),
        runs.start("one-window", 2, keys=keys_of["depths"], window=3, validate_every=2, order="blocks"),
        runs.start("one-window-online", 2, keys=keys_of["online"], window=3),
        runs.start(
            "two-window", 3, keys=keys_of["depths"], window=3, validate_every=2, order="blocks", size=2
        ),
        runs.start("one-window-random", 2, window=3, start="random"),
    )
    return runs


@pytest.mark.parametrize(
    "name, point",
    [("one", "layer_output"), ("one-norm", "final_norm"), ("one-depths", "depths"), ("one-window", "depths")],
)
def test_the_first_loss_is_the_bases(runs: Any, keys_of: dict[str, Path], name: str, point: str) -> None:
    keys = open_keys(keys_of[point])
    order = TrainingOrder(
        num_positions=keys.num_positions,
        block_size=keys.manifest.block_size,
        window_blocks=1024,
        seed=0,
        by_block=point == "depths",
    )
    reader = BatchReader(
        keys,
        None,
        order,
        batch_positions=BATCH,
        rank=0,
        size=1,
        num_micro_batches=1,
        with_log_probabilities=True,
    )
    (batch,), _ = next(iter(reader.stream(0, 1)))
    base_N = batch.targets.base_log_probabilities_N
    assert base_N is not None
    first = runs.losses(name)[0]
    assert abs(first + float(base_N.mean())) < 2e-3 * first  # the stored inputs are bfloat16


def test_inputs_of_several_layers_are_the_same_where_the_base_computes_them(runs: Any) -> None:
    np.testing.assert_allclose(runs.losses("one-online"), runs.losses("one-depths"), rtol=1e-6)
    line = runs.lines("one-depths", "validation_base_perplexity")[0]
    assert 0.8 < line["validation_memory_perplexity"] / line["validation_base_perplexity"] < 1.25


@torch.no_grad()
def test_whoever_reads_such_a_memory_reads_those_layers(
    runs: Any, base_dir: Path, corpus_dir: Path, keys_of: dict[str, Path], tmp_path: Path
) -> None:
    memory = load_memory(runs / "one-depths")
    base = load_base(str(base_dir), dtype=torch.float32, device="cpu")
    ids_BS = torch.arange(12).reshape(2, 6)
    point = CapturePoint(layer=1, point="layer_output", earlier=(0,))
    inputs_BSI = capture(base, [point])(ids_BS).states[point]
    expected_BSV = memory.module.head(memory.module(inputs_BSI)).log_softmax(-1)
    joint = MemoryAugmentedLM.from_pretrained(base, memory, lmbda=1.0)
    torch.testing.assert_close(joint(ids_BS).logits.log_softmax(-1), expected_BSV, rtol=1e-4, atol=1e-4)
    joint.save_pretrained(tmp_path / "export")
    again = MemoryAugmentedLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(again(ids_BS).logits.log_softmax(-1), expected_BSV, rtol=1e-4, atol=1e-4)

    config = evaluate.Config(
        model=str(base_dir),
        corpus=corpus_dir,
        memory=(str(runs / "one-depths"),),
        output=tmp_path / "report",
        samples=0,
        bootstrap_samples=100,
    )
    evaluate.run(config, World())
    arms = {arm.name: arm for arm in open_report(tmp_path / "report").evaluation.arms}
    assert 0.8 < arms["base+memory"].ppl / arms["base"].ppl < 1.05


def test_a_window_reads_the_same_wherever_its_inputs_come_from(
    runs: Any, base_dir: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    np.testing.assert_allclose(runs.losses("one-window-online"), runs.losses("one-window"), rtol=1e-6)
    np.testing.assert_allclose(runs.losses("two-window"), runs.losses("one-window"), rtol=1e-5)
    assert runs.losses("one-window")[-1] != runs.losses("one-depths")[-1]
    trained = read_weights(runs / "one-window").memory
    assert trained["window"] == 3 and trained["input_size"] == 6 * trained["hidden_size"]
    line = runs.lines("one-window", "validation_base_perplexity")[0]
    assert 0.8 < line["validation_memory_perplexity"] / line["validation_base_perplexity"] < 1.25
    of_two = runs.lines("two-window", "validation_base_perplexity")[0]
    assert of_two["validation_base_perplexity"] == pytest.approx(line["validation_base_perplexity"], rel=1e-6)
    random = read_weights(runs / "one-window-random").memory
    assert random["input_size"] == 3 * random["hidden_size"]

    config = evaluate.Config(
        model=str(base_dir),
        corpus=corpus_dir,
        memory=(str(runs / "one-window"),),
        output=tmp_path / "report",
        bootstrap_samples=100,
    )
    evaluate.run(config, World())
    arms = {arm.name: arm for arm in open_report(tmp_path / "report").evaluation.arms}
    assert 0.8 < arms["base+memory"].ppl / arms["base"].ppl < 1.05
    export = convert_checkpoint.Config(
        checkpoint=(runs / "one-window",), model=str(base_dir), output=tmp_path / "export", lmbda=1.0
    )
    convert_checkpoint.run(export, World())  # compares what it wrote with base and memory
    assert "at 3 positions, its own the last" in (tmp_path / "export" / "README.md").read_text()
    joint = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    point = CapturePoint(layer=1, point="layer_output", earlier=(0,))
    ids_S = torch.arange(9)
    with torch.no_grad():
        states_SD = capture(joint.base, [point])(ids_S[None]).states[point][0]
        expected_SV = joint.memory.head(joint.memory(with_past(states_SD, 2))).log_softmax(-1)
        found_SV = joint(ids_S[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(found_SV, expected_SV, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_base_with_a_norm_and_a_soft_cap_of_its_own_goes_through_every_stage(
    runs: Any, corpus_dir: Path, tmp_path: Path
) -> None:
    """Gemma 2's: keys, training with a loss through the soft cap, an export that is compared and loaded."""
    sizes = {**BASES["gemma2"], "vocab_size": VOCAB_SIZE, "final_logit_softcapping": 5.0}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes))
    model.save_pretrained(tmp_path / "base")
    keys = extract_keys.Config(
        model=str(tmp_path / "base"),
        corpus=corpus_dir,
        output=tmp_path / "keys",
        input_layer=(0.4, -1),
        input_point="layer_output",
    )
    extract_keys.run(keys, World())
    flags = {"keys": tmp_path / "keys", "model": tmp_path / "base", "learning_rate": 1e-3}
    runs.succeed(runs.start("capped", 2, **flags))
    assert read_weights(runs / "capped").memory["logit_softcap"] == 5.0
    export = convert_checkpoint.Config(
        checkpoint=(runs / "capped",), model=str(tmp_path / "base"), output=tmp_path / "export", lmbda=1.0
    )
    convert_checkpoint.run(export, World())
    joint = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    ids_BS = torch.arange(12).reshape(2, 6)
    base_BSV = model.eval()(input_ids=ids_BS).logits.log_softmax(-1)
    difference_BSV = (joint(ids_BS).logits.log_softmax(-1) - base_BSV).abs()
    assert 1e-4 < difference_BSV.max() < 0.5  # a few steps from where it started


def test_ranks_stages_and_resumes_give_the_same(runs: Any) -> None:
    np.testing.assert_allclose(runs.losses("two"), runs.losses("one"), rtol=1e-5)
    np.testing.assert_array_equal(runs.losses("stopped"), runs.losses("two"))
    runs.assert_same_weights("stopped", "two")
    provenance = read_weights(runs / "two").provenance
    assert (provenance.start, provenance.head) == ("base", "base")
    assert json.loads((runs / "two" / "run.json").read_text())["config"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keys": "ffn_input"}, "--input-layer -1 --input-point layer_output"),
        ({"head": "random"}, "leave out --head random"),
        ({"model": None}, "--start base needs --model"),
        ({"model": None, "start": "random", "head": "frozen"}, "--head frozen needs --model"),
        ({"init_from": "x"}, "leave out --start base"),
        ({"hidden_size": 12}, "leave out --hidden-size and --preset"),
        ({"preset": "gelu-18x768"}, "leave out --hidden-size and --preset"),
    ],
)
def test_what_cannot_start_leaves_the_disk_untouched(
    runs: Any, keys_of: dict[str, Path], changes: dict[str, Any], said: str
) -> None:
    values = {"num_blocks": None, **changes}
    if "keys" in values:
        values["keys"] = keys_of[values["keys"]]
    runs.refuse(said, "wrong", 2, **values)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("point", [LAST, FINAL], ids=["layer_output", "final_norm"])
def test_it_is_the_base_before_the_first_step(family: str, point: CapturePoint, tmp_path: Path) -> None:
    model = tiny_base(family)
    model.save_pretrained(tmp_path)
    if point is LAST and family in CAN_START_AT_NORM_ONLY:
        with pytest.raises(UnknownStructureError, match="is not understood: a matrix"):
            started(tmp_path, point)
        return
    ids_BS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    state_BSD = capture(model, [point])(ids_BS).states[point]
    expected_BSV = model(input_ids=ids_BS).logits.log_softmax(-1)
    for kind in ("gelu", "swiglu"):
        memory = started(tmp_path, point, family=kind)
        logits_BSV = memory.head(memory(memory.cast(state_BSD)))
        assert (logits_BSV.log_softmax(-1) - expected_BSV).abs().max() < 2e-5
    # What evaluation and training say of labels is of the same distribution, and so nearly is int8.
    tokens_N1 = ids_BS.reshape(-1, 1)
    inputs_ND = state_BSD.reshape(len(tokens_N1), -1)
    wanted_N1 = expected_BSV.reshape(len(tokens_N1), -1).gather(1, tokens_N1)
    found_N1 = memory_scores(memory, inputs_ND, tokens_N1.numpy()).log_probabilities_NJ
    assert (found_N1 - wanted_N1).abs().max() < 2e-5
    objective = MemoryWithLoss(memory.config, alpha=0.5)
    objective.load_state_dict(memory.state_dict())
    labels_N = objective.label_log_probabilities(inputs_ND, tokens_N1[:, 0])
    assert (labels_N - wanted_N1[:, 0]).abs().max() < 2e-5
    quantize_linears(memory)
    rounded_N1 = memory_scores(memory, inputs_ND, tokens_N1.numpy()).log_probabilities_NJ
    assert 0 < (rounded_N1 - wanted_N1).abs().max() < 0.2


def test_the_head_alone_brings_what_stands_behind_it(tmp_path: Path) -> None:
    tiny_base("cohere").save_pretrained(tmp_path / "cohere")
    start = head_start(open_base_files(str(tmp_path / "cohere")))
    assert start.fields == {"head_bias": False, "logit_scale": 0.3, "logit_softcap": None}
    tiny_base("gptj").save_pretrained(tmp_path / "gptj")
    start = head_start(open_base_files(str(tmp_path / "gptj")))
    assert start.fields["head_bias"] and set(start.readers) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    "point",
    [
        CapturePoint(layer=2),
        CapturePoint(layer=1, point="layer_output"),
        CapturePoint(layer=0, point="layer_output"),
    ],
)
def test_points_before_the_last_layer_is_done_name_the_flags(point: CapturePoint, tmp_path: Path) -> None:
    tiny_base("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--input-layer -1 --input-point layer_output"):
        whole_start(open_base_files(str(tmp_path)), point, num_layers=LAYERS)


def test_another_width_is_refused(tmp_path: Path) -> None:
    tiny_base("llama").save_pretrained(tmp_path)
    start = whole_start(open_base_files(str(tmp_path)), LAST, num_layers=LAYERS)
    with pytest.raises(UserError, match="leave out --hidden-size and --preset"):
        start.check_fits(vocab_size=61, hidden_size=40, input_size=32)
    with pytest.raises(UserError, match="the inputs have 16 numbers and the base's head reads 32"):
        start.check_fits(vocab_size=61, hidden_size=32, input_size=16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt_post_norm"])
@pytest.mark.parametrize("point", ["layer_output", "final_norm"])
def test_earlier_layers_change_nothing_before_the_first_step(family: str, point: Any, tmp_path: Path) -> None:
    model = tiny_base(family)
    model.save_pretrained(tmp_path)
    if family == "opt_post_norm" and point == "layer_output":
        return
    ids_BS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    several = CapturePoint(layer=2, point=point, earlier=(0, 1))
    state_BSD = capture(model, [several])(ids_BS).states[several]
    expected_BSV = model(input_ids=ids_BS).logits.log_softmax(-1)
    memory = started(tmp_path, several, input_size=state_BSD.shape[-1])
    assert (memory.head(memory(state_BSD)).log_softmax(-1) - expected_BSV).abs().max() < 2e-5
    assert memory.input_projection is not None
    torch.nn.init.normal_(memory.input_projection.weight)  # and then the earlier layers count
    assert (memory.head(memory(state_BSD)).log_softmax(-1) - expected_BSV).abs().max() > 1e-2

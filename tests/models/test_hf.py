"""The joint model: the mixture in fp64, generation beside the bare base, padding, and life outside this
package."""

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

from mlpmem_ds.models import mixture
from mlpmem_ds.models.backbone import CapturePoint, capture
from mlpmem_ds.models.hf import MEMORY_INPUT, MemoryAugmentedLM
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.memory import Memory, MemoryConfig, MemoryHead
from mlpmem_ds.models.mixture import Constant, GateInputs, log_mixture_of_logits
from mlpmem_ds.models.mixture_on_device import mixture_on_device

VOCAB, WIDTH, PAD, EOS = 61, 32, 0, 2
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
LLAMA_SIZES = {
    **TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BASES = {
    "gpt2": {
        **TOKENS,
        "n_embd": WIDTH,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
    },  # head tied to the embeddings
    "llama": LLAMA_SIZES,
    "qwen2": {**LLAMA_SIZES, "tie_word_embeddings": True},
    "gemma2": {**LLAMA_SIZES, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
    "opt": {**LLAMA_SIZES, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
}
POINT = CapturePoint(layer=2)


def spread(model: nn.Module, seed: int) -> None:
    """Weights far from the start, so that distributions are peaked and mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def tiny_base(family: str) -> PreTrainedModel:
    torch.manual_seed(5)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASES[family]))
        .eval()
        .requires_grad_(False)
    )
    spread(model, 6)
    return model


def tiny_memory(**changes: object) -> Memory:
    torch.manual_seed(7)
    values = {
        "input_size": WIDTH,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_blocks": 2,
        "vocab_size": VOCAB,
    }
    memory = Memory(MemoryConfig.from_dict({**values, **changes}))
    spread(memory, 8)
    return memory


def tiny_joint(family: str, lmbda: float = 0.4, point: CapturePoint = POINT) -> MemoryAugmentedLM:
    return MemoryAugmentedLM.from_parts(tiny_base(family), tiny_memory(), lmbda=lmbda, input_point=point)


def random_ids(num_sequences: int = 3, num_tokens: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(9))


def expected_log_probabilities(
    joint: MemoryAugmentedLM, ids_BS: torch.Tensor, point: CapturePoint
) -> torch.Tensor:
    """The mixture in fp64 from its definition, the memory's input by a capture of its own."""
    state_BSD = capture(joint.base, [point])(ids_BS).states[point]
    base_BSV = joint.base(ids_BS).logits.double().softmax(-1)
    memory_BSV = joint.memory.head(joint.memory(state_BSD)).double().softmax(-1)
    return ((1 - joint.lmbda) * base_BSV + joint.lmbda * memory_BSV).log()


@pytest.mark.parametrize("family", BASES)
def test_logits_are_the_mixture(family: str) -> None:
    ids_BS = random_ids()
    points = [POINT, CapturePoint(layer=0, point="layer_output"), CapturePoint(layer=-1, point="final_norm")]
    for point in points if family in ("gpt2", "opt") else points[:1]:
        joint = tiny_joint(family, point=point)
        expected_BSV = expected_log_probabilities(joint, ids_BS, point)
        with torch.no_grad():
            logits_BSV = joint(ids_BS).logits
        assert logits_BSV.dtype == torch.float32
        torch.testing.assert_close(logits_BSV.double(), expected_BSV, rtol=1e-5, atol=1e-5)
        assert (expected_BSV.exp() - joint.base(ids_BS).logits.double().softmax(-1)).abs().max() > 0.02


def test_lmbda_is_settable_and_exact_at_its_ends() -> None:
    joint, ids_BS = tiny_joint("gpt2"), random_ids()
    joint.lmbda = 0
    assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits)
    for lmbda in (1.0, 0.9):
        joint.lmbda = lmbda
        torch.testing.assert_close(
            joint(ids_BS).logits.double(),
            expected_log_probabilities(joint, ids_BS, POINT),
            rtol=1e-5,
            atol=1e-5,
        )
    for wrong in (-0.01, 1.01, float("nan"), True, "0.3"):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            joint.lmbda = wrong  # type: ignore[assignment]
    assert joint.lmbda == 0.9


@pytest.mark.parametrize("family", BASES)
def test_without_the_memory_generation_is_the_bases(family: str) -> None:
    joint, ids_BS = tiny_joint(family, lmbda=0.0), random_ids()
    ways = ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_p": 0.9})
    for way in ways:
        results = []
        for model in (joint.base, joint):
            torch.manual_seed(10)
            results.append(model.generate(ids_BS, max_new_tokens=12, **way))
        assert torch.equal(*results), way


@pytest.mark.parametrize("family", BASES)
def test_greedy_generation_follows_the_mixture_without_a_cache(family: str) -> None:
    joint, ids_BS = tiny_joint(family), random_ids()
    generated = joint.generate(ids_BS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    sequence = ids_BS
    for _ in range(8):
        sequence = torch.cat(
            [sequence, expected_log_probabilities(joint, sequence, POINT)[:, -1:].argmax(-1)], dim=1
        )
    assert torch.equal(generated, sequence)
    static = joint.generate(
        ids_BS, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation="static"
    )
    assert torch.equal(static, sequence)
    assert not torch.equal(
        generated, joint.base.generate(ids_BS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    )


@pytest.mark.parametrize("family", BASES)
def test_a_padded_batch_generates_what_each_prompt_generates_alone(family: str) -> None:
    joint = tiny_joint(family)
    prompts = [random_ids(1, num_tokens) for num_tokens in (2, 7, 5)]
    batch = torch.full((3, 7), PAD)
    for row, prompt in enumerate(prompts):
        batch[row, 7 - prompt.shape[1] :] = prompt
    for way in ({"num_beams": 1}, {"num_beams": 2}):
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, **way}
        together = joint.generate(batch, attention_mask=(batch != PAD).long(), **options)
        for row, prompt in enumerate(prompts):
            alone = joint.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert together[row, 7:].tolist() == alone[0, prompt.shape[1] :].tolist(), (row, way)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_with_a_static_cache_compiles_whole(family: str) -> None:
    joint, ids_BS = tiny_joint(family), random_ids(2, 7)
    compiled = torch.compile(joint, fullgraph=True, backend="eager")
    caches = [StaticCache(config=joint.base.config, max_cache_len=12) for _ in range(2)]
    for cache in caches:
        joint(ids_BS, past_key_values=cache, use_cache=True)
    for step in range(2):
        inputs = {"input_ids": ids_BS[:, step : step + 1], "position_ids": torch.full((2, 1), 7 + step)}
        plain, traced = (
            model(**inputs, past_key_values=cache, use_cache=True).logits
            for model, cache in zip((joint, compiled), caches, strict=True)
        )
        torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-5)
    sequence = torch.cat([ids_BS, ids_BS[:, :2]], dim=1)
    torch.testing.assert_close(
        traced[:, 0].double(), expected_log_probabilities(joint, sequence, POINT)[:, -1], rtol=1e-4, atol=1e-4
    )
    torch.compiler.reset()


def test_another_function_may_mix() -> None:
    joint, ids_BS = tiny_joint("llama"), random_ids()
    plain = joint(ids_BS).logits
    calls: list[float] = []

    def mixture(base: torch.Tensor, memory: torch.Tensor, lmbda: float) -> torch.Tensor:
        calls.append(lmbda)
        return mixture_on_device(base, memory, lmbda)

    joint.mixture = mixture
    torch.testing.assert_close(joint(ids_BS).logits, plain, rtol=0, atol=1e-6)
    joint.lmbda = 0.0
    assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits) and calls == [0.4]


class LearnedGate(nn.Module):
    """λ from the base's entropy and two of its states, one of them the memory's own input."""

    reads = {"middle": CapturePoint(layer=1, point="layer_output")}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * width + 1, 1)

    def forward(self, inputs: GateInputs, /) -> torch.Tensor:
        assert inputs.base_logits is not None and inputs.memory_logits is not None
        assert inputs.base_logits.shape == inputs.memory_logits.shape
        log_base = inputs.base_logits.log_softmax(-1)
        entropy = -(log_base.exp() * log_base).sum(-1, keepdim=True)
        features = torch.cat([entropy, inputs.states["middle"], inputs.states[MEMORY_INPUT]], dim=-1)
        weight: torch.Tensor = self.layer(features).sigmoid()[..., 0]
        return weight

    def settings(self) -> dict[str, object]:
        return {"kind": "learned", "width": WIDTH}


@torch.no_grad()
def test_a_learned_gate_is_one_more_member(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(lmbda: float, settings: Mapping[str, Any]) -> LearnedGate:
        assert lmbda == 0.4
        return LearnedGate(settings["width"])

    monkeypatch.setattr(mixture, "GATES", {**mixture.GATES, "learned": build})
    base, ids_BS = tiny_base("llama"), random_ids()
    joint = MemoryAugmentedLM.from_parts(base, tiny_memory(), lmbda=0.4, input_point=POINT)
    torch.manual_seed(1)
    gate = LearnedGate(WIDTH)
    joint.set_gate(gate)
    states = capture(base, [POINT, gate.reads["middle"]])(ids_BS).states
    base_logits, memory_logits = base(ids_BS).logits, joint.memory.head(joint.memory(states[POINT]))
    inputs = GateInputs(
        base_logits=base_logits,
        memory_logits=memory_logits,
        states={"middle": states[gate.reads["middle"]], MEMORY_INPUT: states[POINT]},
    )
    lmbda_BS = gate(inputs)
    assert lmbda_BS.shape == ids_BS.shape and float(lmbda_BS.std()) > 0.01
    expected_BSV = log_mixture_of_logits(base_logits, memory_logits, lmbda_BS)
    torch.testing.assert_close(joint(ids_BS).logits, expected_BSV, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(joint, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids_BS).logits, expected_BSV, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    last_BV = joint(ids_BS, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(last_BV, expected_BSV[:, -1], rtol=1e-5, atol=1e-5)
    generated = joint.generate(ids_BS, max_new_tokens=4, do_sample=False, eos_token_id=None)

    joint.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["gate"] == {"kind": "learned", "width": WIDTH}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids_BS).logits, joint(ids_BS).logits)
    again = loaded.generate(ids_BS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(again, generated)

    joint.lmbda = 0.7
    assert joint.gate == Constant(0.7) and joint.config.gate == {"kind": "constant"}
    assert not any(name.startswith("gate") for name in joint.state_dict())
    expected_BSV = expected_log_probabilities(joint, ids_BS, POINT)
    torch.testing.assert_close(joint(ids_BS).logits.double(), expected_BSV, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("point", [POINT, CapturePoint(layer=0, point="layer_output")])
def test_copies_are_apart_and_a_base_is_left_as_it_was(point: CapturePoint) -> None:
    base, ids_BS = tiny_base("llama"), random_ids()

    def num_hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules())

    before = num_hooks()
    joints = [
        MemoryAugmentedLM.from_parts(base, tiny_memory(), lmbda=lmbda, input_point=point)
        for lmbda in (0.4, 0.7)
    ]
    logits = [joint(ids_BS).logits for joint in joints]
    copied = copy.deepcopy(joints[0])
    for parameter in copied.base.parameters():
        parameter.zero_()
    assert not torch.equal(copied(ids_BS).logits, logits[0])
    assert all(
        torch.equal(joint(ids_BS).logits, wanted) for joint, wanted in zip(joints, logits, strict=True)
    )
    assert num_hooks() == before + 2
    del joints
    gc.collect()
    assert num_hooks() == before


def test_generation_stops_at_the_end_token() -> None:
    joint, prompt = tiny_joint("llama"), random_ids(1)
    free = joint.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 7:].tolist()
    stopped = joint.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=free[2])[0, 7:].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


def test_the_memory_runs_on_the_kept_positions_only() -> None:
    joint, ids_BS = tiny_joint("llama"), random_ids()
    whole_BSV = joint(ids_BS).logits
    shapes: list[tuple[int, ...]] = []
    joint.memory.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    per_row = torch.tensor([[0, 6], [1, 5], [2, 4]])
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    cases = {
        (3, 1, WIDTH): (1, whole_BSV[:, -1:]),
        (3, 3, WIDTH): (torch.tensor([0, 3, 6]), whole_BSV[:, [0, 3, 6]]),
        (3, 2, WIDTH): (per_row, torch.take_along_dim(whole_BSV, per_row[..., None], dim=1)),
        (2, WIDTH): (mask, whole_BSV[mask]),
    }
    for shape, (keep, expected) in cases.items():
        torch.testing.assert_close(joint(ids_BS, logits_to_keep=keep).logits, expected, rtol=1e-5, atol=1e-5)
        assert shapes.pop() == shape
    joint.generate(ids_BS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert shapes == [(3, 1, WIDTH)] * 3


def test_loss_and_tuple_output() -> None:
    joint, ids_BS = tiny_joint("gpt2"), random_ids()
    labels_BS = ids_BS.clone()
    labels_BS[0, :4] = -100
    log_p = expected_log_probabilities(joint, ids_BS, POINT)[:, :-1].gather(2, ids_BS[:, 1:, None])[..., 0]
    counted = labels_BS[:, 1:] != -100
    output = joint(ids_BS, labels=labels_BS)
    assert output.loss.item() == pytest.approx(-log_p[counted].mean().item(), rel=1e-5)
    by_count = joint(ids_BS, labels=labels_BS, num_items_in_batch=torch.tensor(5)).loss
    assert by_count.item() == pytest.approx(-log_p[counted].sum().item() / 5, rel=1e-5)
    as_tuple = joint(ids_BS, labels=labels_BS, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)
    joint.lmbda = 0.0
    assert joint(ids_BS, labels=labels_BS).loss.item() == pytest.approx(
        joint.base(ids_BS, labels=labels_BS).loss.item(), rel=1e-6
    )


def test_parts_are_kept_and_a_training_head_is_replaced() -> None:
    class TrainingHead(MemoryHead):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the training head must not run")

    base = tiny_base("llama").to(torch.bfloat16)
    memory = Memory(tiny_memory().config, head_class=TrainingHead)
    before = {
        name: tensor.clone() for name, tensor in [*base.state_dict().items(), *memory.state_dict().items()]
    }
    attention, logits = base.config._attn_implementation, base(random_ids()).logits
    joint = MemoryAugmentedLM.from_parts(base, memory, lmbda=0.5, input_point=POINT)
    assert base.config._attn_implementation == attention == "sdpa" and torch.equal(
        base(random_ids()).logits, logits
    )
    assert joint.base is base and joint.memory.head.weight.dtype == torch.bfloat16 and not joint.training
    assert joint(random_ids()).logits.isfinite().all()
    after = dict([*base.state_dict().items(), *memory.state_dict().items()])
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )


def test_fresh_joint_model_initializes_the_memory_by_its_own_rule() -> None:
    config = MemoryAugmentedConfig(
        base_config=AutoConfig.for_model("llama", **LLAMA_SIZES).to_dict(),
        memory_config=MemoryConfig(
            input_size=WIDTH, hidden_size=96, intermediate_size=256, num_blocks=8, vocab_size=VOCAB
        ).to_dict(),
    )
    memory = MemoryAugmentedLM(config).memory
    assert memory.blocks[3].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert memory.blocks[3].mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert not memory.blocks[3].mlp.down.bias.any() and (memory.final_norm.weight == 1).all()


def test_the_bases_config_is_copied_into_the_joint_one() -> None:
    given = AutoConfig.for_model("llama", **LLAMA_SIZES, attn_implementation="sdpa")
    joined = MemoryAugmentedConfig(base_config=given, attn_implementation="eager")
    assert (given._attn_implementation, joined.base_config._attn_implementation) == ("sdpa", "eager")
    assert MemoryAugmentedConfig(base_config=given).base_config._attn_implementation == "sdpa"


def test_what_does_not_fit_is_refused() -> None:
    base = tiny_base("gpt2")
    for changes, message in (
        ({"vocab_size": 60}, "60 tokens and the base 61"),
        ({"input_size": 31}, "31 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryAugmentedLM.from_parts(base, tiny_memory(**changes), lmbda=0.5, input_point=POINT)
    with pytest.raises(ValueError, match="4 layers"):
        MemoryAugmentedLM.from_parts(base, tiny_memory(), lmbda=0.5, input_point=CapturePoint(layer=4))
    with pytest.raises(ValueError, match="lmbda"):
        MemoryAugmentedLM.from_parts(base, tiny_memory(), lmbda=1.5, input_point=POINT)
    with pytest.raises(ValueError, match="needs base_config"):
        MemoryAugmentedLM(MemoryAugmentedConfig())
    with pytest.raises(ValueError, match="no model_type"):
        MemoryAugmentedConfig(base_config={"hidden_size": 3})
    with pytest.raises(ValueError, match="'nosuchmodel'"):
        MemoryAugmentedConfig(base_config={"model_type": "nosuchmodel"})


def export(family: str, directory: Path) -> MemoryAugmentedLM:
    joint = MemoryAugmentedLM.from_parts(
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
    "mixture.py",
    "memory.py",
    "backbone.py",
    "structure.py",
    "quantized.py",
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

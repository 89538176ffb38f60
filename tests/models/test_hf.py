"""The joint model: the mixture in fp64, generation compared with the bare base, padding, and parts."""

import copy
import gc

import pytest
import torch
from transformers import AutoConfig, StaticCache

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.memory import Memory, MemoryHead
from mlpmem_ds.models.memory_config import MemoryConfig

from ..joint_models import joined
from .conftest import (
    BASES,
    LLAMA_SIZES,
    PAD,
    POINT,
    VOCAB,
    WIDTH,
    expected_log_probabilities,
    random_ids,
    tiny_base,
    tiny_joint,
    tiny_memory,
)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_logits_become_the_bases_as_the_weight_does_0(family: str) -> None:
    """So that penalties, which ask for the sign of a score, act as with the base."""
    joint, ids_BS = tiny_joint(family), random_ids()
    base_BSV = joint.base(ids_BS).logits
    assert float(base_BSV.max()) > 0
    differences = []
    for lmbda in (1e-2, 1e-4, 1e-6):
        joint.lmbda = lmbda
        differences.append(float((joint(ids_BS).logits - base_BSV).abs().max()))
    assert differences[0] > 10 * differences[1] and differences[2] < 1e-3
    penalized = []
    for lmbda in (0.0, 1e-7):
        joint.lmbda = lmbda
        penalized.append(joint.generate(ids_BS, max_new_tokens=8, do_sample=False, repetition_penalty=1.5))
    assert torch.equal(*penalized)


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
        torch.testing.assert_close(logits_BSV.double().log_softmax(-1), expected_BSV, rtol=1e-5, atol=1e-5)
        totals_BS = joint.base(ids_BS).logits.logsumexp(-1)
        torch.testing.assert_close(logits_BSV.logsumexp(-1), totals_BS, rtol=1e-5, atol=1e-5)
        assert (expected_BSV.exp() - joint.base(ids_BS).logits.double().softmax(-1)).abs().max() > 0.02


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
        traced[:, 0].double().log_softmax(-1),
        expected_log_probabilities(joint, sequence, POINT)[:, -1],
        rtol=1e-4,
        atol=1e-4,
    )
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("point", [POINT, CapturePoint(layer=0, point="layer_output")])
def test_copies_are_apart_and_a_base_is_left_as_it_was(point: CapturePoint) -> None:
    base, ids_BS = tiny_base("llama"), random_ids()

    def num_hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules())

    before = num_hooks()
    joints = [joined(base, tiny_memory(), lmbda=lmbda, input_point=point) for lmbda in (0.4, 0.7)]
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
    joint = joined(base, memory, lmbda=0.5, input_point=POINT)
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
            joined(base, tiny_memory(**changes), lmbda=0.5, input_point=POINT)
    with pytest.raises(ValueError, match="4 layers"):
        joined(base, tiny_memory(), lmbda=0.5, input_point=CapturePoint(layer=4))
    with pytest.raises(ValueError, match="lmbda"):
        joined(base, tiny_memory(), lmbda=1.5, input_point=POINT)
    with pytest.raises(ValueError, match="needs base_config"):
        MemoryAugmentedLM(MemoryAugmentedConfig())
    with pytest.raises(ValueError, match="no model_type"):
        MemoryAugmentedConfig(base_config={"hidden_size": 3})
    with pytest.raises(ValueError, match="'nosuchmodel'"):
        MemoryAugmentedConfig(base_config={"model_type": "nosuchmodel"})

"""The threshold below which a memory is left out, and banks: who runs, what is counted, what is mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlpmem_ds.models.gates import ConfidencesGate, RouterGate
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.joint_step import BaseOnly
from mlpmem_ds.models.mixture import Constant, Weights, log_mixture_of_bank

from .carried_generation import generate
from .conftest import POINT, VOCAB, WIDTH, expected_log_probabilities, random_ids, tiny_joint
from .test_history_cache import LAST, LENGTHS, with_history
from .test_history_cache import Weights as Given


def runs_of(joint: MemoryAugmentedLM) -> list[int]:
    """Rows of each run of the first memory, as they come."""
    rows: list[int] = []
    joint.memory.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].numel() // WIDTH))
    return rows


@torch.no_grad()
def parts(joint: MemoryAugmentedLM, ids_BS: torch.Tensor) -> list[torch.Tensor]:
    """log p of the base and of each memory, float64 [B, S, V]."""
    from mlpmem_ds.models.backbone import capture

    points = [POINT, LAST][: len(joint.memories)]
    states = capture(joint.base, points)(ids_BS).states
    of_memories = (
        memory.head(memory(states[point])) for memory, point in zip(joint.memories, points, strict=True)
    )
    return [logits.double().log_softmax(-1) for logits in (joint.base(ids_BS).logits, *of_memories)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_bank_mixes_memories_that_read_different_states(family: str) -> None:
    joint, ids_BS = tiny_joint(family, num_memories=2), random_ids()
    base, *memories = parts(joint, ids_BS)
    for gate, weights in (
        (Weights((0.1, 0.6)), (0.1, 0.6)),
        (Constant(0.4), (0.2, 0.2)),
        (Weights((0, 1)), (0, 1)),
    ):
        joint.set_gate(gate)
        expected = log_mixture_of_bank(base, memories, torch.tensor(weights))
        torch.testing.assert_close(
            joint(ids_BS).logits.double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5
        )
        last = joint(ids_BS, logits_to_keep=1).logits
        torch.testing.assert_close(last.double().log_softmax(-1), expected[:, -1:], rtol=1e-5, atol=1e-5)
    for nothing in (Constant(0.0), Weights((0.0, 0.0))):
        joint.set_gate(nothing)
        assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits)
    with pytest.raises(ValueError, match="of 1 memories, and the model has 2"):
        joint.set_gate(ConfidencesGate(lmbdas=(0.4,)))
    with pytest.raises(ValueError, match="of 3 memories, and the model has 2"):
        joint.set_gate(Weights((0.1, 0.1, 0.1)))


@torch.no_grad()
def test_without_a_threshold_nothing_is_left_out_and_with_one_of_0_neither() -> None:
    joint = with_history("llama")
    plain = generate(joint, "greedy", lengths=LENGTHS)
    joint.base_only_threshold = 0.0
    assert torch.equal(generate(joint, "greedy", lengths=LENGTHS).sequences, plain.sequences)
    assert joint.base_only.rows == 3 * 6 and joint.base_only.skipped_rows == 0
    for wrong in (-0.1, 1.1, True, "0.1"):
        with pytest.raises(ValueError, match="base_only_threshold"):
            joint.base_only_threshold = wrong  # type: ignore[assignment]


@torch.no_grad()
@pytest.mark.parametrize("num_memories", [1, 2])
def test_rows_below_the_threshold_are_the_bases_and_are_not_run(num_memories: int) -> None:
    joint, ids_BS = tiny_joint("gpt2", num_memories=num_memories), random_ids(4, 6)
    gate = ConfidencesGate(lmbdas=(0.4 / num_memories,) * num_memories)
    torch.manual_seed(3)
    gate.standardize(torch.full_like(gate.mean, -1.0), torch.full_like(gate.mean, 2.0))
    torch.nn.init.normal_(gate.out.weight)
    joint.set_gate(gate)
    rows = runs_of(joint)
    with Given(joint) as given:
        joint(ids_BS)
        joint.base_only_threshold = 1.0
        assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits)
        foreseen = given[1].view(4, 6, num_memories)
        joint.base_only_threshold = threshold = float(foreseen.median())
        joint.base_only = BaseOnly()
        found = joint(ids_BS).logits
        foreseen_again, exact = (each.view(4, 6, num_memories) for each in given[2:])
    assert torch.equal(foreseen_again, foreseen)
    left_out = foreseen < threshold
    assert 0 < int(left_out.sum()) < left_out.numel()
    assert rows == [24, int((~left_out[..., 0]).sum())]
    weights = torch.where(left_out | (exact < threshold), 0.0, exact)
    base, *memories = parts(joint, ids_BS)
    expected = log_mixture_of_bank(base, memories, weights)
    torch.testing.assert_close(found.double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
    alone = (weights == 0).all(-1)
    assert bool(alone.any()) == (num_memories == 1)
    torch.testing.assert_close(found[alone], joint.base(ids_BS).logits[alone], rtol=1e-6, atol=1e-6)
    counts = joint.base_only
    assert (counts.rows, counts.skipped_rows) == (24 * num_memories, int(left_out.sum()))
    assert counts.runs == num_memories and counts.skipped_runs == 0 and counts.bytes == 0
    flops = sum(
        2 * int(left_out[..., number].sum()) * memory.config.num_matrix_parameters()
        for number, memory in enumerate(joint.memories)
    )
    assert counts.flops == flops and f"{counts.skipped_rows} of {counts.rows} positions" in str(counts)


@torch.no_grad()
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_memory_of_a_bank_that_is_left_out_is_not_run(is_int8: bool) -> None:
    joint, ids_BS = tiny_joint("gpt2", num_memories=2), random_ids(1, 1)
    if is_int8:
        joint.quantize_memory()
    base, _, other = parts(joint, ids_BS)
    gate = ConfidencesGate(lmbdas=(0.1, 0.5))
    joint.set_gate(gate)
    rows = runs_of(joint)
    joint.base_only_threshold = 0.3
    found = joint(ids_BS).logits.double().log_softmax(-1)
    assert rows == [] and (joint.base_only.runs, joint.base_only.skipped_runs) == (2, 1)
    expected = log_mixture_of_bank(base, [base, other], torch.tensor((0.0, 0.5)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_memories_that_share_one_weight_are_cut_by_their_own_part_of_it() -> None:
    joint, ids_BS = tiny_joint("gpt2", 0.4, num_memories=2), random_ids()
    whole = joint(ids_BS).logits
    for threshold in (0.0, 0.1, 0.2):
        joint.base_only_threshold = threshold
        torch.testing.assert_close(joint(ids_BS).logits, whole, rtol=1e-5, atol=1e-5)
    joint.base_only_threshold = 0.3
    assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits)


@torch.no_grad()
@pytest.mark.parametrize("num_memories", [1, 2])
def test_a_lambda_that_is_named_is_meant_without_the_threshold(num_memories: int) -> None:
    joint, ids_BS = tiny_joint("gpt2", 0.1, num_memories=num_memories), random_ids()
    whole = joint(ids_BS).logits
    joint.set_gate(ConfidencesGate(lmbdas=(0.4 / num_memories,) * num_memories))
    joint.base_only_threshold = 0.3
    joint.lmbda = 0.1
    assert joint.base_only_threshold is None
    assert torch.equal(joint(ids_BS).logits, whole)
    joint.base_only_threshold = 0.3
    assert torch.equal(joint(ids_BS).logits, joint.base(ids_BS).logits)


@torch.no_grad()
def test_a_decoding_step_that_foresees_no_memory_runs_none() -> None:
    joint, ids_BS = with_history("llama"), random_ids(1, 9)
    rows, options = runs_of(joint), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    joint.base_only_threshold = 1.0
    found = joint.generate(ids_BS, **options)
    assert rows == [9]  # the prompt, whose history is made of what both said
    assert torch.equal(found, joint.base.generate(ids_BS, **options))
    counts = joint.base_only
    assert (counts.runs, counts.skipped_runs, counts.skipped_rows) == (7, 7, 7)
    assert counts.bytes == 7 * 4 * joint.memory.config.num_parameters()


@torch.no_grad()
def test_a_memory_that_was_left_out_counts_in_the_history_as_the_base() -> None:
    joint, ids_BS = with_history("gpt2"), random_ids(1, 9)
    history: Any = joint.gate.history  # type: ignore[union-attr]
    given = []
    joint.gate.register_forward_pre_hook(lambda _, args: given.append(args[0].history))  # type: ignore[union-attr]
    joint.base_only_threshold = 1.0
    sequence = joint.generate(ids_BS, max_new_tokens=6, do_sample=False, eos_token_id=None)[0]
    base_SV, memory_SV = (values[0] for values in parts(joint, sequence[None]))
    state, states = history.start(), []
    for at, token in enumerate(sequence[1:].tolist()):
        of_memory = (memory_SV if at < 9 else base_SV)[at, token]  # the prompt's last position was run, too
        state = history.update(state, base_SV[at, token], of_memory[None])
        states.append(state)
    steps = torch.cat([each[0] for each in given[2::1]])
    torch.testing.assert_close(steps, torch.stack(states[8:13]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_first_step_weighs_a_bank_as_the_forward_in_which_all_ran() -> None:
    """There the weight of one memory does not know what another says that is left out, either."""
    joint, ids_BS = with_history("gpt2", num_memories=2), random_ids(8, 9)
    rows = runs_of(joint)
    with Given(joint) as given:
        joint.base_only_threshold = 1.0
        joint(ids_BS)
    foreseen_BM = given[0][:, -1]
    joint.base_only_threshold = float(foreseen_BM.median())
    is_left_out_BM = foreseen_BM < joint.base_only_threshold
    assert bool((is_left_out_BM[:, 0] != is_left_out_BM[:, 1]).any())
    before = joint(ids_BS[:, :-1], use_cache=True).past_key_values
    rows.clear()
    step = joint(ids_BS[:, -1:], past_key_values=before).logits[:, -1]
    assert rows == [int((~is_left_out_BM[:, 0]).sum())]
    torch.testing.assert_close(step, joint(ids_BS).logits[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_compiled_steps_give_the_same_and_run_all() -> None:
    joint, ids_BS = tiny_joint("llama"), random_ids(3, 5)
    gate = ConfidencesGate(lmbdas=(0.4,))
    torch.manual_seed(3)
    torch.nn.init.normal_(gate.out.weight)
    joint.set_gate(gate)
    with Given(joint) as given:
        joint.base_only_threshold = 0.5
        joint(ids_BS)
    joint.base_only_threshold = float(given[0].median())
    plain = joint(ids_BS).logits
    compiled = torch.compile(joint, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids_BS).logits, plain, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
def test_a_router_reads_the_states_of_base_and_memories() -> None:
    joint, ids_BS = tiny_joint("llama", num_memories=2), random_ids()
    gate = RouterGate(lmbdas=(0.2, 0.2), base_size=WIDTH, memory_sizes=[24, 20])
    torch.manual_seed(3)
    torch.nn.init.normal_(gate.out.weight)
    joint.set_gate(gate)
    with Given(joint) as given:
        logits = joint(ids_BS).logits
        joint.base_only_threshold = 0.05
        joint(ids_BS)
    base, *memories = parts(joint, ids_BS)
    torch.testing.assert_close(
        logits.double().log_softmax(-1), log_mixture_of_bank(base, memories, given[0]), rtol=1e-5, atol=1e-5
    )
    assert logits.shape[-1] == VOCAB and bool(torch.isfinite(given[1]).all())


def test_one_memory_is_as_before() -> None:
    joint, ids_BS = tiny_joint("llama"), random_ids()
    expected = expected_log_probabilities(joint, ids_BS, POINT)
    torch.testing.assert_close(joint(ids_BS).logits.double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
    joint.set_gate(Weights((0.4,)))
    torch.testing.assert_close(joint(ids_BS).logits.double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5)

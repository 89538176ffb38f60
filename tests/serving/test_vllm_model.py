"""The class for vLLM, over stand-ins of vLLM: its logits are those of the transformers class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.gates import ConfidencesGate, HistoryGate, RouterGate
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.mixture import Weights
from mlpmem_ds.models.shared_head import head_fingerprint
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.serving.request_weights import STEP

from ..joint_models import joined
from ..models.conftest import VOCAB, WIDTH, random_ids, spread, tiny_base, tiny_joint, tiny_memory
from .conftest import BLOCK_SIZE, CONTEXT, BaseWithOutputs, engine_config
from .toy_exports import spread_features

POINTS = {
    "last": CapturePoint(layer=-1, point="final_norm"),
    "mlp": CapturePoint(layer=2),
    "mlps": CapturePoint(layer=-1, earlier=(0, 2)),
    "output": CapturePoint(layer=1, point="layer_output"),
    "last-and-earlier": CapturePoint(layer=-1, point="final_norm", earlier=(0, 2)),
}
IDS_T = random_ids(1, 9)[0]
ROWS = torch.tensor([8, 2, 5])  # as of three requests


def served(vllm: SimpleNamespace, joint: MemoryAugmentedLM, **changes: Any) -> Any:
    """The export's weights in the class for vLLM."""
    model = vllm.vllm_model.MemoryAugmentedLM(vllm_config=engine_config(joint, **changes)).eval()
    loaded = model.load_weights(joint.state_dict().items())
    named = [*model.named_parameters(), *model.named_buffers()]
    assert not {name for name, _ in named if not name.startswith("base.")} - loaded
    return model


@torch.no_grad()
def logits_of(model: Any, rows: torch.Tensor = ROWS) -> torch.Tensor:
    states = model(IDS_T, torch.arange(len(IDS_T)))
    return model.compute_logits(states[rows])


@contextmanager
def step_of(model: Any, num_tokens: int) -> Iterator[None]:
    """As of an engine that holds a text of so many tokens in blocks of its cache, all of it in this step."""
    spec, count = model.slots.get_kv_cache_spec(engine_config(model)), -(-num_tokens // BLOCK_SIZE)
    model.slots.kv_cache = torch.full((count + 2, 1, spec.block_size, spec.head_size), torch.nan)
    blocks = torch.arange(count, 0, -1)
    slots = (
        blocks[torch.arange(num_tokens) // BLOCK_SIZE] * BLOCK_SIZE + torch.arange(num_tokens) % BLOCK_SIZE
    )
    metadata = SimpleNamespace(
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        slot_mapping=slots,
        block_table_tensor=blocks[None].int(),
    )
    backend = model.slots.get_attn_backend()
    builder = backend.get_builder_cls()(spec, ["slots.4"], None, "cpu")
    CONTEXT.attn_metadata = {"slots.4": builder.build(0, metadata), "base.model.layers.0": object()}
    try:
        yield
    finally:
        CONTEXT.attn_metadata = None


@torch.no_grad()
def expected_of(joint: MemoryAugmentedLM, rows: torch.Tensor = ROWS) -> torch.Tensor:
    return joint(input_ids=IDS_T[None]).logits[0, rows]


def joint_at(point: CapturePoint, family: str = "llama", **changes: Any) -> MemoryAugmentedLM:
    input_size = WIDTH * len(point.parts) * changes.get("window", 1)
    memory = tiny_memory(input_size=input_size, **changes)
    return joined(tiny_base(family), memory, lmbda=0.4, input_point=point)


@pytest.mark.parametrize("base_class", [None, BaseWithOutputs], ids=["hooks", "outputs"])
@pytest.mark.parametrize("point", list(POINTS))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_those_of_the_transformers_class(
    vllm: SimpleNamespace, family: str, point: str, base_class: Any
) -> None:
    joint = joint_at(POINTS[point], family)
    model = served(vllm, joint, **({} if base_class is None else {"base_class": base_class}))
    torch.testing.assert_close(logits_of(model), expected_of(joint), rtol=0, atol=1e-5)


def test_a_base_that_hands_over_too_few_outputs_is_refused(vllm: SimpleNamespace) -> None:
    class Forgetful(BaseWithOutputs):
        def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
            self.layers = layers[:1]

    model = served(vllm, joint_at(POINTS["last-and-earlier"]), base_class=Forgetful)
    with pytest.raises(RuntimeError, match="handed over 1 inner states, and 2 are read"):
        logits_of(model)


def test_logits_of_a_base_with_a_soft_cap(vllm: SimpleNamespace) -> None:
    joint = joint_at(POINTS["last"], "gemma2", logit_softcap=5.0)
    torch.testing.assert_close(logits_of(served(vllm, joint)), expected_of(joint), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "gate",
    [
        Weights((0.3,)),
        ConfidencesGate(lmbdas=[0.3], hidden=8),
        RouterGate(lmbdas=[0.3], base_size=WIDTH, memory_sizes=[24], hidden=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("threshold", [None, 0.35])
def test_gates_and_the_base_alone(vllm: SimpleNamespace, gate: Any, threshold: float | None) -> None:
    joint = tiny_joint("llama")
    if isinstance(gate, torch.nn.Module):
        spread(gate, 4)
        spread_features(gate)
    joint.set_gate(gate)
    joint.base_only_threshold = threshold
    torch.testing.assert_close(logits_of(served(vllm, joint)), expected_of(joint), rtol=0, atol=1e-5)


def joint_with_past(*, window: int = 1, num_memories: int = 1, has_history: bool = True) -> MemoryAugmentedLM:
    point = POINTS["mlps"]
    joint = joint_at(point, window=window) if window > 1 else tiny_joint("llama", num_memories=num_memories)
    if has_history:
        gate = HistoryGate(lmbdas=[0.5 / num_memories] * num_memories, hidden=8)
        spread(gate, 4)
        spread_features(gate)
        joint.set_gate(gate)
    return joint


PASTS: list[dict[str, Any]] = [
    {},
    {"num_memories": 3},
    {"window": 3, "has_history": False},
    {"window": 3},
]


@pytest.mark.parametrize(
    ("changes", "threshold"),
    [*((changes, None) for changes in PASTS), (PASTS[0], 0.45), (PASTS[1], 0.15), (PASTS[3], 0.45)],
    ids=str,
)
def test_what_rows_carry_of_the_tokens_before(
    vllm: SimpleNamespace, changes: dict[str, Any], threshold: float | None
) -> None:
    joint = joint_with_past(**changes)
    joint.base_only_threshold = threshold
    model = served(vllm, joint)
    with step_of(model, len(IDS_T)):
        found = logits_of(model, torch.arange(len(IDS_T)))
    assert not model.slots.states().read(torch.tensor([BLOCK_SIZE])).isnan().any()  # the text's last block
    torch.testing.assert_close(found, expected_of(joint, torch.arange(len(IDS_T))), rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.45])
def test_a_history_is_followed_where_requests_name_a_weight(
    vllm: SimpleNamespace, threshold: float | None
) -> None:
    joint = joint_with_past()
    joint.base_only_threshold = threshold
    model = served(vllm, joint)
    STEP.put(torch.tensor([0.1, float("nan"), 0.0], dtype=torch.float64))
    with step_of(model, len(IDS_T)):
        found = logits_of(model)
    torch.testing.assert_close(found[1], expected_of(joint)[1], rtol=0, atol=1e-5)
    for row, lmbda in ((0, 0.1), (2, 0.0)):
        joint.lmbda = lmbda
        torch.testing.assert_close(found[row], expected_of(joint)[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_decoding_step_takes_the_logits_that_it_was_sampled_from(vllm: SimpleNamespace) -> None:
    """The rows are those of a step in which all runs again; neither heads nor memory do."""
    joint, last = joint_with_past(num_memories=3), len(IDS_T) - 1
    model = served(vllm, joint)
    runs: list[int] = []
    for memory in (model.memory, *model.further_memories):
        memory.register_forward_hook(lambda *_: runs.append(1))
    with step_of(model, len(IDS_T)):
        whole = model(IDS_T, torch.arange(len(IDS_T)))
        chunks = model.slots.chunks()
        before = replace(chunks, ends=chunks.ends - 1, lengths=chunks.lengths - 1, num_tokens=last)
        before = replace(before, ends=torch.tensor([0, last], dtype=torch.int32), slots=chunks.slots[:last])
        now = replace(chunks, ends=torch.tensor([0, 1], dtype=torch.int32), slots=chunks.slots[last:])
        own_TO = whole[:, : model.layout.own_width]
        for is_kept in (True, False):
            rows = model._past.extend(own_TO[:last], IDS_T[:last], before, model.slots.states())
            logits = model.compute_logits(rows[last - 1 :])
            torch.testing.assert_close(logits[0], expected_of(joint, torch.tensor([last - 1]))[0])
            if not is_kept:
                model._kept.expect(torch.tensor([-1]))
            runs.clear()
            heads_before = model.base.num_heads_used
            step = replace(now, num_tokens=1)
            found = model._past.extend(own_TO[last:], IDS_T[last:], step, model.slots.states())
            assert (len(runs), model.base.num_heads_used - heads_before) == ((0, 0) if is_kept else (3, 1))
            torch.testing.assert_close(found[0], whole[last], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "ranks", "is_kept"), [(None, 1, True), (0.4, 1, False), (None, 2, False)]
)
def test_logits_are_kept_where_they_are_each_models_own(
    vllm: SimpleNamespace, threshold: float | None, ranks: int, is_kept: bool
) -> None:
    joint = joint_with_past()
    joint.base_only_threshold = threshold
    assert (served(vllm, joint, tensor_parallel_size=ranks)._kept is not None) == is_kept
    assert served(vllm, joint_with_past(window=3, has_history=False))._kept is None


def test_an_engine_that_measures_itself_runs_the_heads_and_keeps_nothing(vllm: SimpleNamespace) -> None:
    """Its rows are as wide as others, each as of a text's first token."""
    model = served(vllm, joint_with_past())
    assert logits_of(model).shape == (len(ROWS), VOCAB)
    assert model.base.num_heads_used == 2
    assert model.slots.kv_cache.numel() == 0
    with pytest.raises(ValueError, match="--enable-prompt-embeds"):
        model._with_past(model.slots, torch.zeros(1, 3), None)


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-offloading-size"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"use_ubatching": True}, "--enable-dbo and --ubatch-size"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
def test_modes_that_would_lose_the_past_are_refused(
    vllm: SimpleNamespace, setting: dict[str, Any], flag: str
) -> None:
    for changes in PASTS[0], PASTS[2]:
        with pytest.raises(ValueError, match=f"are not kept with .*{flag}: leave that out"):
            served(vllm, joint_with_past(**changes), **setting)


def test_a_bank(vllm: SimpleNamespace) -> None:
    joint = tiny_joint("llama", num_memories=3)
    joint.set_gate(Weights((0.2, 0.1, 0.4)))
    torch.testing.assert_close(logits_of(served(vllm, joint)), expected_of(joint), rtol=0, atol=1e-5)


def test_a_memory_with_the_bases_head_uses_the_engines(vllm: SimpleNamespace) -> None:
    base = tiny_base("llama")
    fingerprint = head_fingerprint(output_head(base)[0])
    memory = tiny_memory(hidden_size=WIDTH, shared_head=fingerprint)
    joint = joined(base, memory, lmbda=0.4, input_point=POINTS["last"])
    assert not any("memory.head" in name for name in joint.state_dict())
    model = served(vllm, joint)
    torch.testing.assert_close(logits_of(model), expected_of(joint), rtol=0, atol=1e-5)
    assert model.base.num_heads_used == 2


def test_without_weight_the_logits_are_the_bases_bit_for_bit(vllm: SimpleNamespace) -> None:
    joint = tiny_joint("llama", lmbda=0.0)
    model = served(vllm, joint)
    with torch.no_grad():
        final = model(IDS_T, torch.arange(len(IDS_T)))[ROWS, :WIDTH]
        assert torch.equal(logits_of(model), model.base.compute_logits(final))
        assert torch.equal(model.embed_input_ids(IDS_T), joint.base.get_input_embeddings()(IDS_T))


@pytest.mark.parametrize("num_memories", [1, 2])
@pytest.mark.parametrize("default", [0.0, 0.4])
def test_each_request_has_its_own_weight(vllm: SimpleNamespace, default: float, num_memories: int) -> None:
    joint = tiny_joint("llama", lmbda=default, num_memories=num_memories)
    model = served(vllm, joint)
    STEP.put(torch.tensor([0.9, float("nan"), 0.0], dtype=torch.float64))
    found = logits_of(model)
    for row, lmbda in enumerate((0.9, default, 0.0)):
        joint.lmbda = lmbda
        torch.testing.assert_close(found[row], expected_of(joint)[row], rtol=0, atol=1e-5)
    # Prompt log-probabilities, asked for in the same step, are of the engine's weight.
    joint.lmbda = default
    prompt = torch.arange(6)
    torch.testing.assert_close(logits_of(model, prompt), expected_of(joint, prompt), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_memories", "threshold"), [(1, 0.38), (3, 0.15)])
def test_the_threshold_is_of_the_gate_and_not_of_a_weight_that_a_request_names(
    vllm: SimpleNamespace, num_memories: int, threshold: float
) -> None:
    joint = tiny_joint("llama", num_memories=num_memories)
    gate = ConfidencesGate(lmbdas=[0.3 / num_memories] * num_memories, hidden=8)
    spread(gate, 4)
    spread_features(gate)
    joint.set_gate(gate)
    whole = expected_of(joint)
    joint.base_only_threshold = threshold
    cut = expected_of(joint)
    assert not torch.allclose(cut[1], whole[1], atol=1e-3)
    model = served(vllm, joint)
    STEP.put(torch.tensor([0.1, float("nan"), 0.0], dtype=torch.float64))
    found = logits_of(model)
    torch.testing.assert_close(found[1], cut[1], rtol=0, atol=1e-5)
    for row, lmbda in ((0, 0.1), (2, 0.0)):
        joint.lmbda = lmbda
        torch.testing.assert_close(found[row], expected_of(joint)[row], rtol=0, atol=1e-5)


def test_a_fixed_weight_in_the_place_of_a_learned_gate(vllm: SimpleNamespace) -> None:
    joint = tiny_joint("llama")
    joint.set_gate(HistoryGate(lmbdas=[0.3], hidden=8))
    joint.base_only_threshold = 0.35
    weights = dict(joint.state_dict())
    joint.config.gate, joint.config.lmbda = {"kind": "constant"}, 0.25  # as by --hf-overrides
    joint.config.base_only_threshold = None
    model = vllm.vllm_model.MemoryAugmentedLM(vllm_config=engine_config(joint)).eval()
    model.load_weights(weights.items())
    assert model.slots is None
    joint.lmbda = 0.25
    torch.testing.assert_close(logits_of(model), expected_of(joint), rtol=0, atol=1e-5)


def test_what_a_compiled_model_hands_over(vllm: SimpleNamespace) -> None:
    for name in ("last", "last-and-earlier"):
        served(vllm, joint_at(POINTS[name]), enforce_eager=False, base_class=BaseWithOutputs)
    for name, base_class in (("mlp", BaseWithOutputs), ("output", None)):
        changes = {} if base_class is None else {"base_class": base_class}
        with pytest.raises(ValueError, match="--enforce-eager, or train a memory on keys of"):
            served(vllm, joint_at(POINTS[name]), enforce_eager=False, **changes)


def test_modes_that_would_give_other_results_are_refused(vllm: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        served(vllm, joint_at(POINTS["last"]), pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="leave out --speculative-config"):
        served(vllm, joint_at(POINTS["mlp"]), speculative_config=object())
    served(vllm, joint_at(POINTS["last"]), speculative_config=object())


def test_logits_that_another_rank_gathers(vllm: SimpleNamespace) -> None:
    model = served(vllm, joint_at(POINTS["last"]))
    model.base.compute_logits = lambda hidden: None
    assert logits_of(model) is None

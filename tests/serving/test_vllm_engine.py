"""Exports in a real vLLM, in this process: what it generates is what the transformers class generates.

`bash tests/serving/run.sh` makes an environment with vLLM for a CPU and runs this file there.
"""

from __future__ import annotations

import copy
import gc
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

# Read when vLLM is imported: one process, so that each engine does not import everything again.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # on a GPU: V2 refuses our logits processor
vllm = pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/run.sh")

from mlpmem_ds.models.capture_point import CapturePoint  # noqa: E402
from mlpmem_ds.models.gates import ConfidencesGate, HistoryGate  # noqa: E402
from mlpmem_ds.models.hf import MemoryAugmentedLM  # noqa: E402

from .toy_exports import LAST, LENGTH, Export, make_export  # noqa: E402

PROCESSOR = "mlpmem_ds.serving.vllm_requests:RequestLambda"
BOUND = 1e-3  # nats between two engines in float32
NUM_NEW = 16
# Cores that this process may use, which need not be the first ones.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
EXPORTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "point": LAST},
    "gpt2": {"family": "gpt2", "point": CapturePoint(layer=2)},
    "qwen2": {
        "family": "qwen2",
        "point": CapturePoint(layer=-1, point="final_norm", earlier=(0, 2)),
        "gate_class": ConfidencesGate,
        "threshold": 0.4,
    },
    "past": {
        "family": "qwen2",
        "point": CapturePoint(layer=-1, point="final_norm", earlier=(0, 2)),
        "further": [LAST],
        "gate_class": HistoryGate,
        "window": 3,
    },
    "mistral": {
        "family": "mistral",
        "point": LAST,
        "has_base_head": True,
        "further": [CapturePoint(layer=1)],
    },
}


def prompts() -> list[list[int]]:
    """Of 2 to 40 tokens: more than one step of the engine takes."""
    generator = torch.Generator().manual_seed(4)
    lengths = (2, 40, 7, 19, 33, 3, 11, 26)
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def engine(directory: Path, **options: Any) -> Iterator[Any]:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": LENGTH,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "seed": 0,
        **options,
    }
    llm = vllm.LLM(model=str(directory), **settings)
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(
    llm: Any,
    lmbdas: Sequence[float | None] | None = None,
    *,
    texts: Sequence[list[int]] | None = None,
    **options: Any,
) -> list[Any]:
    """Of each prompt what vLLM returns; each request with its own λ, where they are given."""
    texts = prompts() if texts is None else texts
    settings = {"temperature": 0, "max_tokens": NUM_NEW, "logprobs": 5, "ignore_eos": True, **options}
    params = [
        vllm.SamplingParams(
            **settings, detokenize=False, extra_args=None if lmbda is None else {"lmbda": lmbda}
        )
        for lmbda in lmbdas or [None] * len(texts)
    ]
    inputs = [{"prompt_token_ids": ids} for ids in texts]
    return llm.generate(inputs, params, use_tqdm=False)


def tokens_of(results: Sequence[Any]) -> list[list[int]]:
    return [list(result.outputs[0].token_ids) for result in results]


@torch.no_grad()
def expected_tokens(joint: MemoryAugmentedLM, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    joint.generation_config.eos_token_id = None
    found = joint.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, **options
    )
    return found[0, len(prompt) :].tolist()


@torch.no_grad()
def largest_difference(joint: MemoryAugmentedLM, result: Any) -> float:
    """In nats, between the log-probabilities of a result and those of one forward over its text."""
    prompt, new = list(result.prompt_token_ids), list(result.outputs[0].token_ids)
    expected = joint(input_ids=torch.tensor([prompt + new])).logits[0].log_softmax(-1)
    rows = [(len(prompt) - 1 + step, row) for step, row in enumerate(result.outputs[0].logprobs)]
    rows += [(place - 1, row) for place, row in enumerate(result.prompt_logprobs or []) if row is not None]
    return max(
        abs(entry.logprob - float(expected[place, token]))
        for place, row in rows
        for token, entry in row.items()
    )


def check(joint: MemoryAugmentedLM, results: Sequence[Any]) -> float:
    """Tokens equal, log-probabilities within BOUND; the largest difference."""
    for result, tokens in zip(results, tokens_of(results), strict=True):
        assert tokens == expected_tokens(joint, list(result.prompt_token_ids))
    difference = max(largest_difference(joint, result) for result in results)
    assert difference <= BOUND
    return difference


def check_requests(joint: MemoryAugmentedLM, llm: Any) -> None:
    """In one batch requests at several λ, each as the model at that λ; and some at the gate's."""
    gate, threshold = joint.gate, joint.base_only_threshold
    lmbdas = [None, 0.0, 1.0, 0.25, 0.9, None, 0.05, 0.5]
    for result, lmbda in zip(generate(llm, lmbdas), lmbdas, strict=True):
        if lmbda is None:
            joint.set_gate(gate)
            joint.base_only_threshold = threshold
        else:
            joint.lmbda = lmbda
        assert largest_difference(joint, result) <= BOUND, lmbda
        assert list(result.outputs[0].token_ids) == expected_tokens(joint, list(result.prompt_token_ids))
    joint.set_gate(gate)
    joint.base_only_threshold = threshold


@pytest.fixture(params=list(EXPORTS))
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Export:
    return make_export(tmp_path, **EXPORTS[request.param])


def test_generation_is_that_of_the_transformers_class(export: Export) -> None:
    """Chunked prefill, prompt log-probabilities, cached prefixes, penalties, and λ of single requests."""
    joint = export.joint
    with engine(export.directory, logits_processors=[PROCESSOR]) as llm:
        difference = check(joint, generate(llm, prompt_logprobs=2))
        again = generate(llm, repetition_penalty=1.3)
        for prompt, tokens in zip(prompts(), tokens_of(again), strict=True):
            assert tokens == expected_tokens(joint, prompt, repetition_penalty=1.3)
        check_requests(joint, llm)
        with pytest.raises(vllm.exceptions.VLLMValidationError, match="a number in"):
            generate(llm, [1.5] * 8)
    print(f"\n{type(joint.base).__name__}: log-probabilities within {difference:.1e} nats")


def test_the_past_of_a_text_is_kept_whatever_an_engine_does_with_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached beginnings, prompts in chunks, requests that are stopped and begun again for lack of room."""
    stopped = count_stops(monkeypatch)
    export = make_export(tmp_path, **EXPORTS["past"])
    first = prompts()[1]
    # Five blocks, and as many of these texts come to the end of theirs at once.
    crowd = [[*first[:19], token] for token in range(5, 11)]
    with engine(export.directory, block_size=32, num_gpu_blocks_override=6, max_num_batched_tokens=16) as llm:
        check(export.joint, generate(llm, texts=crowd))
        generate(llm, texts=[first])
        again = generate(llm, texts=[first, first[:34] + prompts()[2], prompts()[3]])
    check(export.joint, again)
    assert stopped and [result.num_cached_tokens for result in again] == [32, 32, 0]
    forgets = copy.deepcopy(export.joint.gate)
    assert isinstance(forgets, HistoryGate)
    forgets.scale[-forgets.history.size :] = 0.0
    export.joint.set_gate(forgets)
    assert max(largest_difference(export.joint, result) for result in again) > 100 * BOUND


def count_stops(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that the engine's scheduler stops from now on, to make room for others."""
    from vllm.v1.core.sched.scheduler import Scheduler

    stopped: list[Any] = []
    stop = Scheduler._preempt_request

    def counted(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        stopped.append(request.request_id)
        return stop(scheduler, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    return stopped


@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="a compiler for C++ is needed"
)
def test_a_compiled_model_gives_the_same(tmp_path: Path) -> None:
    """Outputs of layers too, which the base itself hands over; and what rows carry of the past."""
    export = make_export(tmp_path, **EXPORTS["past"])
    with engine(export.directory, enforce_eager=False) as llm:
        check(export.joint, generate(llm))


@pytest.mark.skipif(
    (torch.cuda.device_count() if torch.cuda.is_available() else len(CORES)) < 2,
    reason="two GPUs are needed, or two cores",
)
@pytest.mark.parametrize("name", ["qwen2", "mistral", "past"])
def test_a_base_cut_in_two_gives_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism, with a bank whose first memory has the base's head; each rank has all memories."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, CORES[:2])))
    export = make_export(tmp_path, **EXPORTS[name])
    with engine(export.directory, tensor_parallel_size=2, logits_processors=[PROCESSOR]) as llm:
        check(export.joint, generate(llm))
        check_requests(export.joint, llm)


def test_weight_0_is_the_base_alone_and_what_the_memory_costs(tmp_path: Path) -> None:
    export = make_export(tmp_path, "llama", LAST, lmbda=0.5)
    with engine(export.directory, logits_processors=[PROCESSOR]) as llm:
        without = generate(llm, [0.0] * 8)
        with_memory = tokens_of(generate(llm))
        joint_rate = tokens_per_second(llm)
    with engine(export.base) as llm:
        alone = generate(llm)
        base_rate = tokens_per_second(llm)
    assert tokens_of(without) == tokens_of(alone) != with_memory
    for one, other in zip(without, alone, strict=True):
        for left, right in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert max(abs(left[token].logprob - right[token].logprob) for token in left) < 1e-5
    print(f"\n{joint_rate:,.0f} tokens/s with the memory, {base_rate:,.0f} of the base alone")


def tokens_per_second(llm: Any) -> float:
    """On a CPU of this process's own time: other programs do not count."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    results = generate(llm, logprobs=None)
    return sum(map(len, tokens_of(results))) / (clock() - began)


def test_what_cannot_be_served_says_what_to_do(tmp_path: Path) -> None:
    export = make_export(tmp_path, "llama", CapturePoint(layer=2))
    with pytest.raises(ValueError, match="--enforce-eager"), engine(export.directory, enforce_eager=False):
        pass


@pytest.mark.skipif(
    "MLPMEM_SERVING_EXPORT" not in os.environ, reason="set MLPMEM_SERVING_EXPORT to an export of yours"
)
def test_an_export_of_the_users_own(tmp_path: Path) -> None:
    """Greedy tokens and log-probabilities of a real export, and its rate next to the base's alone."""
    directory = Path(os.environ["MLPMEM_SERVING_EXPORT"])
    joint = MemoryAugmentedLM.from_pretrained(str(directory), dtype=torch.float32).eval()
    difference, joint_rate = _difference_and_rate(directory, joint)
    joint.base.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        base_rate = tokens_per_second(llm)
    print(
        f"\nlog-probabilities within {difference:.1e} nats;"
        f" {joint_rate:,.1f} tokens/s with the memory, {base_rate:,.1f} of the base alone"
    )


def _difference_and_rate(directory: Path, joint: MemoryAugmentedLM) -> tuple[float, float]:
    """In a scope of its own: an engine that is still held when the next one starts takes its groups along."""
    with engine(directory, logits_processors=[PROCESSOR]) as llm:
        return check(joint, generate(llm, prompt_logprobs=1)), tokens_per_second(llm)

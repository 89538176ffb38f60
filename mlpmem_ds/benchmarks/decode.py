"""Benchmark `decode`: a prompt → **time to the first token, tokens a second**, with and without memory,
kNN-LM and RAG.

base            a Llama of random weights: `generate` of transformers, greedy, its own cache.
base_memory     the joint model of that base and a random memory, the same call.
base_memory_int8  the same with the memory's matrices in int8.
knn_exact_N     kNN-LM: at every token a search among N stored int8 keys, all of them compared.
knn_ivfpq_N     the same with IVF-PQ, the found distances computed anew from the stored keys.
rag             the base alone with five passages before the prompt; finding them costs one product with all
                passages.

Each arm runs the same `generate`; a streamer takes the time of each token. A step's time is the median over
the tokens after the first, an arm's the median over the runs; arms are interleaved. At batch 1 and without a
GPU a step reads every weight once, so that its time should grow as the bytes do: `overhead_over_bytes_ratio`
= overhead_batch1 / (bytes of base and memory / bytes of base), 1 where the memory costs what its bytes say.
Embeddings that are only looked up do not count.

Shape legend: B prompts, S tokens of a prompt, V vocabulary, N stored keys, D width, E size of a key, K
neighbours, P passages.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.streamers import BaseStreamer

from mlpmem_ds.benchmarks.common import Report, Row, check_output, median_of, row_of, use_threads
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.faiss import Index
from mlpmem_ds.engines.faiss_library import set_num_threads
from mlpmem_ds.maths.knn import Neighbours, exact_neighbours
from mlpmem_ds.maths.rescoring import rescore
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.mixture import log_mixture
from mlpmem_ds.models.pretrained_memory import PretrainedMemory
from mlpmem_ds.models.structure import decoder_layers
from mlpmem_ds.stages import shared_flags

_SEED, _LAMBDA, _TEMPERATURE, _NUM_PASSAGES_READ = 4, 0.4, 50_000.0, 5


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Time to the first token and tokens a second of base, base + memory, kNN-LM at three sizes and RAG.

    The default sizes take about 4 minutes and 3 GB on two cores.
    """

    example: ClassVar[str] = "python tools/bench.py decode --output decode.json"

    output: Path = option("JSON file to write")
    layers: int = option("layers of the base", 12, at_least=1)
    width: int = option("numbers in a hidden state; heads are 64 wide", 768, at_least=64)
    vocab_size: int = option("tokens", 16384)
    memory_blocks: int = option("blocks of the memory, as wide as the base's own", 8, at_least=1)
    prompt_tokens: int = option("tokens of a prompt", 64, at_least=1)
    new_tokens: int = option("tokens to generate; the first one is timed apart", 16, at_least=2)
    batch_sizes: tuple[int, ...] = option("prompts at once", (1, 16), at_least=1)
    datastore_sizes: tuple[int, ...] = option("stored keys of the kNN arms", (25_000, 100_000, 400_000))
    key_size: int = option("numbers in a stored int8 key", 256)
    k: int = option("neighbours", 256, at_least=1)
    factory: str = option("faiss factory of the index", "IVF512,PQ32")
    nprobe: int = option("lists that the index probes", 32, at_least=1)
    passages: int = option("passages that RAG chooses from", 20_000, at_least=1)
    passage_tokens: int = option("tokens of a passage", 64, at_least=1)
    runs: int = option("timed runs of each arm", 3, at_least=1)
    threads: int | None = shared_flags.threads()

    def check(self) -> None:
        if self.width % 64:
            raise UserError(f"--width {self.width} must be a multiple of 64")
        if 1 not in self.batch_sizes:
            raise UserError("--batch-sizes must hold 1, whose overhead is compared with the bytes read")
        if min(self.datastore_sizes) < self.k:
            raise UserError(f"--datastore-sizes must be at least --k {self.k}")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Models, datastore and passages."""

    base: Any
    joint: MemoryAugmentedLM
    joint_int8: MemoryAugmentedLM
    projection_DE: Tensor
    keys_NE: np.ndarray
    values_N: np.ndarray
    passage_vectors_PD: Tensor
    passages_PS: Tensor


class _Clock(BaseStreamer):
    """The moment of each token; the first entry is the prompt's."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


class KnnMixture(LogitsProcessor):
    """The kNN-LM: neighbours of what the last MLP reads at the last position, mixed with the base's
    distribution."""

    def __init__(self, setting: Setting, num_keys: int, config: Config, index: Any = None) -> None:
        self._setting, self._num_keys, self._config, self._index = setting, num_keys, config, index
        self._state_BD = torch.empty(0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, the base's forwards leave their last state here."""
        mlp = decoder_layers(self._setting.base)[-1].mlp

        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._state_BD = inputs[0][:, -1]

        handle = mlp.register_forward_pre_hook(keep)  # type: ignore[union-attr]
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        queries_BE = (
            (self._state_BD @ self._setting.projection_DE).clamp(-127, 127).round().to(torch.int8).numpy()
        )
        found = self.neighbours(queries_BE)
        weighting = Weighting(temperature=_TEMPERATURE)
        weights_BK = weighting.weights(found.distances_QK, found.ids_QK >= 0)
        values_BK = torch.from_numpy(self._setting.values_N[found.ids_QK.clip(min=0)])
        knn_BV = torch.zeros(scores.shape).scatter_add_(1, values_BK, torch.from_numpy(weights_BK).float())
        return log_mixture(torch.log_softmax(scores, dim=-1), knn_BV.log(), _LAMBDA)

    def neighbours(self, queries_BE: np.ndarray) -> Neighbours:
        keys_NE = self._setting.keys_NE[: self._num_keys]
        if self._index is None:
            return exact_neighbours(queries_BE, keys_NE, self._config.k, exclusion=None)
        _, ids_BK = self._index.search(queries_BE, self._config.k, self._config.nprobe)
        return rescore(queries_BE, ids_BK, keys_NE).unpack()


def run(config: Config, world: World) -> None:
    check_output(config.output)
    use_threads(config.threads)
    if config.threads:
        set_num_threads(config.threads)
    report = Report("decode", config)
    setting = prepare(config)
    arms = make_arms(config, setting)
    rows: list[Row] = []
    for batch in config.batch_sizes:
        rows += _measure(config, arms, batch)
    rows += [row_of(arm, "bytes_read", "B", [number]) for arm, number in bytes_read(setting).items()]
    report.publish(config.output, rows, _ratios(config, rows))


def prepare(config: Config) -> Setting:
    torch.manual_seed(_SEED)
    generator = np.random.default_rng(_SEED)
    longest = _NUM_PASSAGES_READ * config.passage_tokens + config.prompt_tokens + config.new_tokens
    intermediate = config.width * 8 // 3 // 64 * 64
    base = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=intermediate,
            num_hidden_layers=config.layers, num_attention_heads=config.width // 64,
            max_position_embeddings=longest, tie_word_embeddings=True,
        )
    )  # fmt: skip
    base = base.eval().requires_grad_(False)
    shape = MemoryConfig(
        input_size=config.width, hidden_size=config.width, intermediate_size=intermediate,
        num_blocks=config.memory_blocks, vocab_size=config.vocab_size, family="swiglu",
    )  # fmt: skip
    memory = PretrainedMemory(
        module=Memory(shape).requires_grad_(False), **CapturePoint(layer=-1).settings(), lmbda=_LAMBDA
    )
    joint, joint_int8 = (MemoryAugmentedLM.join(base, [memory]) for _ in range(2))
    num_keys = max(config.datastore_sizes)
    keys_NE = (40 * generator.standard_normal((num_keys, config.key_size), dtype=np.float32)).clip(-127, 127)
    keys_NE = keys_NE.round().astype(np.int8)
    return Setting(
        base=base,
        joint=joint.requires_grad_(False),
        joint_int8=joint_int8.requires_grad_(False).quantize_memory(),
        projection_DE=torch.randn(config.width, config.key_size) * 40 / config.width**0.5,
        keys_NE=keys_NE,
        values_N=generator.integers(config.vocab_size, size=num_keys),
        passage_vectors_PD=torch.randn(config.passages, config.width),
        passages_PS=torch.randint(config.vocab_size, (config.passages, config.passage_tokens)),
    )


def make_arms(config: Config, setting: Setting) -> dict[str, Callable[[int], tuple[Tensor, list[float]]]]:
    """Name → function of the batch size that generates once: the sequences and the moment of each token."""
    arms: dict[str, Callable[[int], tuple[Tensor, list[float]]]] = {
        "base": partial(_generate, config, setting.base),
        "base_memory": partial(_generate, config, setting.joint),
        "base_memory_int8": partial(_generate, config, setting.joint_int8),
    }
    trained = Index.make(config.factory, config.key_size)
    trained.train(setting.keys_NE[: trained.num_training_vectors])
    for size in sorted(config.datastore_sizes):
        index = _index_of_first(trained, setting, size)
        for name, searched in (("exact", None), ("ivfpq", index)):
            mixture = KnnMixture(setting, size, config, searched)
            arms[f"knn_{name}_{size}"] = partial(_generate_knn, config, setting, mixture)
    return arms | {"rag": partial(_generate_rag, config, setting)}


def _index_of_first(trained: Index, setting: Setting, num_keys: int) -> Index:
    index = Index(copy.deepcopy(trained.raw))
    index.fill(setting.keys_NE[:num_keys], np.arange(num_keys))
    return index


def prompts_of(config: Config, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(config.vocab_size, (batch, config.prompt_tokens), generator=generator)


def _generate(
    config: Config,
    model: Any,
    batch: int,
    *,
    tokens_BS: Tensor | None = None,
    processors: Any = None,
    start: float = 0.0,
) -> tuple[Tensor, list[float]]:
    tokens_BS = prompts_of(config, batch) if tokens_BS is None else tokens_BS
    settings = GenerationConfig(
        max_new_tokens=config.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    clock = _Clock()
    clock.moments.append(start or time.perf_counter())
    sequences = model.generate(
        tokens_BS, attention_mask=torch.ones_like(tokens_BS), generation_config=settings, streamer=clock,
        logits_processor=processors,
    )  # fmt: skip
    return sequences, [clock.moments[0], *clock.moments[2:]]  # the prompt is put at once


def _generate_knn(
    config: Config, setting: Setting, mixture: KnnMixture, batch: int
) -> tuple[Tensor, list[float]]:
    with mixture.listening():
        return _generate(config, setting.base, batch, processors=LogitsProcessorList([mixture]))


def _generate_rag(config: Config, setting: Setting, batch: int) -> tuple[Tensor, list[float]]:
    start = time.perf_counter()
    prompts_BS = prompts_of(config, batch)
    queries_BD = setting.base.get_input_embeddings()(prompts_BS).mean(dim=1)
    best_B5 = (queries_BD @ setting.passage_vectors_PD.t()).topk(_NUM_PASSAGES_READ, dim=1).indices
    tokens_BS = torch.cat([setting.passages_PS[best_B5].flatten(1), prompts_BS], dim=1)
    return _generate(config, setting.base, batch, tokens_BS=tokens_BS, start=start)


def _measure(config: Config, arms: dict[str, Any], batch: int) -> list[Row]:
    """Rows of one batch size, the arms interleaved; one round before them warms up."""
    firsts: dict[str, list[float]] = {arm: [] for arm in arms}
    steps: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(config.runs + 1):
        for arm, generate in arms.items():
            moments = generate(batch)[1]
            if number:
                firsts[arm].append(moments[1] - moments[0])
                steps[arm].append(statistics.median(np.diff(moments[1:]).tolist()))
    rows = []
    for arm in arms:
        rows += [
            row_of(arm, f"seconds_to_first_token_batch{batch}", "s", firsts[arm]),
            row_of(arm, f"seconds_per_step_batch{batch}", "s", steps[arm]),
            row_of(
                arm, f"tokens_per_second_batch{batch}", "1/s", [batch / seconds for seconds in steps[arm]]
            ),
        ]
    return rows


def bytes_read(setting: Setting) -> dict[str, int]:
    """Bytes of weights that one step at batch 1 reads: every matrix once; of the tied embedding, the head's
    product."""

    def size(module: torch.nn.Module) -> int:
        return sum(
            tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers())
        )

    base = sum(parameter.numel() * parameter.element_size() for parameter in setting.base.parameters())
    return {
        "base": base,
        "base_memory": base + size(setting.joint.memory),
        "base_memory_int8": base + size(setting.joint_int8.memory),
    }


def _ratios(config: Config, rows: list[Row]) -> dict[str, float]:
    def step(arm: str, batch: int) -> float:
        return median_of(rows, arm, f"seconds_per_step_batch{batch}")

    def first(arm: str, batch: int) -> float:
        return median_of(rows, arm, f"seconds_to_first_token_batch{batch}")

    bytes_ratio = median_of(rows, "base_memory", "bytes_read") / median_of(rows, "base", "bytes_read")
    ratios = {
        "bytes_ratio": bytes_ratio,
        "overhead_over_bytes_ratio": step("base_memory", 1) / step("base", 1) / bytes_ratio,
        "bytes_ratio_int8": (
            median_of(rows, "base_memory_int8", "bytes_read") / median_of(rows, "base", "bytes_read")
        ),
    }
    small, large = min(config.datastore_sizes), max(config.datastore_sizes)
    for batch in config.batch_sizes:
        ratios |= {
            f"overhead_batch{batch}": step("base_memory", batch) / step("base", batch),
            f"overhead_int8_batch{batch}": step("base_memory_int8", batch) / step("base", batch),
            f"first_token_overhead_batch{batch}": first("base_memory", batch) / first("base", batch),
            f"speed_over_knn_exact_batch{batch}": (
                step(f"knn_exact_{large}", batch) / step("base_memory", batch)
            ),
            f"speed_over_knn_ivfpq_batch{batch}": (
                step(f"knn_ivfpq_{large}", batch) / step("base_memory", batch)
            ),
            f"knn_exact_growth_batch{batch}": (
                step(f"knn_exact_{large}", batch) / step(f"knn_exact_{small}", batch)
            ),
            f"knn_ivfpq_growth_batch{batch}": (
                step(f"knn_ivfpq_{large}", batch) / step(f"knn_ivfpq_{small}", batch)
            ),
            f"speed_over_rag_batch{batch}": step("rag", batch) / step("base_memory", batch),
            f"first_token_speed_over_rag_batch{batch}": first("rag", batch) / first("base_memory", batch),
        }
    return ratios

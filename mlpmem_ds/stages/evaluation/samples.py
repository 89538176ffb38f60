"""Samples for the report's page: passages of the test split, continued without and with the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.inputs import Inputs
from mlpmem_ds.stages.generation.generate import continue_batch
from mlpmem_ds.stages.report.summary import MEMORY

_PROMPT_TOKENS, _NEW_TOKENS = 48, 40


@torch.no_grad()
def continue_samples(config: Config, inputs: Inputs, lmbda: float) -> list[dict[str, str]]:
    """`prompt`, `base` and `memory` (texts, always the likeliest token) of `--samples` passages at even
    distances.

    [] without a memory of the arm base+memory, or where the corpus's tokenizer cannot be read alone.
    """
    memory = next((memory for memory in inputs.memories if memory.arm == MEMORY), None)
    corpus = inputs.splits[config.test_split].corpus
    path = corpus.tokenizer_path / "tokenizer.json"
    if memory is None or config.samples == 0 or not path.is_file():
        return []
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    num_tokens = min(_PROMPT_TOKENS, corpus.block_size // 2, corpus.num_tokens)
    starts = np.linspace(0, corpus.num_tokens - num_tokens, config.samples + 2).astype(int)[1:-1]
    prompts = [corpus.tokens(int(start), int(start) + num_tokens).tolist() for start in starts]
    joint = MemoryAugmentedLM.from_parts(
        inputs.source.model,
        memory.memory,
        lmbda=lmbda,
        input_point=memory.point,
        layers_path=inputs.source.layers_path,
    )
    generation = GenerationConfig(
        max_new_tokens=min(_NEW_TOKENS, corpus.block_size - num_tokens),
        do_sample=False,
        eos_token_id=corpus.end_of_document_id,
        pad_token_id=corpus.end_of_document_id,
    )

    def texts(model: Any) -> list[str]:
        return [_decode(tokenizer, row) for row in continue_batch(model, prompts, generation)]

    rows = zip(
        [_decode(tokenizer, row) for row in prompts], texts(inputs.source.model), texts(joint), strict=True
    )
    return [{"prompt": prompt, "base": base, "memory": with_memory} for prompt, base, with_memory in rows]


def _decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))

"""Part of `evaluate`: passages of the test split, continued without and with the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.evaluation import Sample
from mlpmem_ds.formats.window_tokens import begins_with
from mlpmem_ds.models.generation_settings import complete_settings, token_settings
from mlpmem_ds.models.structure import output_head
from mlpmem_ds.stages.generation.generate import continue_batch
from mlpmem_ds.stages.generation.text import text_after

_PROMPT_TOKENS, _NEW_TOKENS = 48, 40


@torch.no_grad()
def continue_samples(base: Any, joint: Any, corpus: CorpusSplit, num_samples: int) -> tuple[Sample, ...]:
    """Continue passages at even distances, always by the likeliest token.

    Args:
        base: the base, which generates.
        joint: the same with the memory.
        corpus: the split that the passages are of.
        num_samples: how many.

    Returns:
        () where the corpus's tokenizer cannot be read alone.
    """
    path = corpus.tokenizer_path / "tokenizer.json"
    if num_samples == 0 or not path.is_file():
        return ()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    num_tokens = min(_PROMPT_TOKENS, corpus.block_size // 2, corpus.num_tokens)
    starts = np.linspace(0, corpus.num_tokens - num_tokens, num_samples + 2).astype(int)[1:-1]
    prompts = [corpus.tokens(int(start), int(start) + num_tokens).tolist() for start in starts]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(corpus.end_of_document_id)
    complete = complete_settings(
        base.generation_config, base=base, tokenizer=tokenizer, num_rows=len(output_head(base)[0])
    )
    generation = GenerationConfig(
        max_new_tokens=min(_NEW_TOKENS, corpus.block_size - num_tokens),
        do_sample=False,
        **token_settings(complete),
    )
    begin = corpus.begin_of_document_ids
    read = [prompt if begins_with(np.array(prompt), begin) else [*begin, *prompt] for prompt in prompts]
    base_tokens, joint_tokens = (continue_batch(model, read, generation) for model in (base, joint))
    return tuple(
        Sample(
            prompt=text_after(tokenizer, (), prompt),
            base=text_after(tokenizer, prompt, by_base),
            memory=text_after(tokenizer, prompt, by_joint),
        )
        for prompt, by_base, by_joint in zip(prompts, base_tokens, joint_tokens, strict=True)
    )

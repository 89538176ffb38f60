"""Part of `generate`: prompts and their continuations as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlpmem_ds.core.files import publish_bytes
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.stages.viewing.html import Passage, render_page
from mlpmem_ds.stages.viewing.token_views import views_of


def write_generated(
    path: Path,
    model: MemoryAugmentedLM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Sequence[int]],
) -> None:
    """Write the page; the model's gate is the one that the text was generated with.

    Args:
        path: of the file.
        model: what generated.
        tokenizer: of the ids.
        prompts: token ids of each.
        rows: the new ones of each.
    """
    passages = [
        Passage(
            title=f"Prompt {number}",
            views=views_of(model, tokenizer, [*prompt, *row]),
            num_given=len(prompt),
        )
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), start=1)
    ]
    publish_bytes(path, render_page("Generated text, token by token", passages).encode())

"""A small export, and question files of each layout, as the test itself writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..conftest import save_export, write_lines

WORDS = ("alpha", "beta", "gamma", "index", "value", "range")


@pytest.fixture(scope="session")
def export_dir(tmp_path_factory: pytest.TempPathFactory, base_dir: Path, corpus_dir: Path) -> Path:
    return save_export(tmp_path_factory.mktemp("run_lm_eval") / "export", base_dir, corpus_dir, lmbda=0.35)


def local_files(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """One file a layout, written to the folder: task → its records."""
    texts = [f"{one} {other} for" for one in WORDS for other in WORDS if one != other]
    files: dict[str, list[dict[str, Any]]] = {
        "nq_open": [{"question": f"What is {word}?", "answer": [word, "x"]} for word in WORDS],
        "strategyqa": [{"question": f"is {word} in?", "answer": word < "c"} for word in WORDS],
        "truthfulqa_mc": [
            {
                "question": f"What {word}?",
                "mc1_targets": {"alpha.": 1, f"no {word}.": 0},
                "mc2_targets": {"alpha.": 1, "beta in.": 1, f"no {word}.": 0, "for index.": 0},
            }
            for word in WORDS
        ],
        "piqa": [{"query": word, "choices": ["in range", f"for {word} é"], "gold": 1} for word in WORDS],
        "sst2": [
            {"text": text, "label": number % 2, "labels": ["negative", "positive"]}
            for number, text in enumerate(texts)
        ],
        "cb": [
            {"premise": word, "hypothesis": "alpha", "label": label}
            for word, label in zip(WORDS, ("entailment", "contradiction", "neutral") * 2, strict=True)
        ],
        "lambada": [{"text": f"{text} {word}"} for text, word in zip(texts, WORDS * 5, strict=True)],
    }
    for name, records in files.items():
        write_lines(folder / f"{name}.dev.jsonl", records)
    return files

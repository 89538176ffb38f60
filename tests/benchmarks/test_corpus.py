"""The corpus benchmark at a tiny size: both arms give the same number of tokens, and the JSON has its
ratio."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ..toy_tokenizers import begin_and_end


def test_both_arms_and_the_ratio(tmp_path: Path, text_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpmem_ds.benchmarks import corpus
    from mlpmem_ds.core.errors import UserError
    from mlpmem_ds.core.world import World

    monkeypatch.setattr(corpus, "_BATCH_BYTES", 1000)
    config = corpus.Config(
        output=tmp_path / "x.json",
        input=(str(text_dir),),
        megabytes=0.02,
        vocab_size=300,
        processes=2,
        runs=1,
    )
    corpus.run(config, World())  # raises where the arms' tokens differ
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["name"] == "corpus" and set(report["ratios"]) == {"speed_over_tokenizer"}
    assert report["ratios"]["speed_over_tokenizer"] > 0
    assert {row["arm"] for row in report["rows"]} == {corpus.BARE, corpus.OURS}
    begin_and_end().save_pretrained(tmp_path / "tokenizer")
    tokenizer = str(tmp_path / "tokenizer")
    corpus.run(replace(config, output=tmp_path / "y.json", tokenizer=tokenizer), World())
    with pytest.raises(UserError, match="--megabytes"):
        corpus.Config(output=tmp_path / "x.json", megabytes=0)

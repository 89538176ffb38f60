from __future__ import annotations

import random
import sys
from dataclasses import replace

import numpy as np
import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.engines import minhash
from mlpmem_ds.engines.minhash import SignatureRules, require_minhash, signer

RULES = SignatureRules(words=3, hashes=128, seed=1)


def words_of(count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [
        chosen.choice("abcdefghij") * chosen.randint(1, 9) + str(chosen.randint(0, 99)) for _ in range(count)
    ]


def similarity(one: str, other: str, rules: SignatureRules = RULES) -> float:
    a, b = (np.frombuffer(signer(rules)(text), np.uint8) for text in (one, other))
    return float(((a == b).mean() - 1 / 256) / (1 - 1 / 256))


def test_the_estimate_is_the_jaccard_similarity() -> None:
    pytest.importorskip("datasketch")
    for share in (0.0, 0.5, 0.8, 0.95):
        same, one, other = words_of(2000, 1), words_of(2000, 2), words_of(2000, 3)
        cut = int(share * 2000)
        texts = [" ".join(same[:cut] + rest[cut:]) for rest in (one, other)]
        grams = [{tuple(text.split()[at : at + 3]) for at in range(1998)} for text in texts]
        jaccard = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        assert abs(similarity(*texts) - jaccard) < 0.15


def test_case_and_what_stands_between_words_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasketch")
    text = " ".join(words_of(400, 4))
    assert similarity(text, text.upper().replace(" ", ",\n ")) == 1
    whole = signer(RULES)(text)
    monkeypatch.setattr(minhash, "_AT_ONCE", 7)  # in parts
    assert signer(RULES)(text) == whole and len(whole) == 128


def test_short_texts_and_those_without_words_are_their_own() -> None:
    pytest.importorskip("datasketch")
    assert similarity("one two", "one two") == 1 and similarity("one two", "one three") < 0.2
    assert similarity("***", "---") < 0.2 and similarity("***", "***") == 1
    assert (
        similarity("東京都の人口は多い。駅も多い。", "大阪府の人口は多い。駅も多い。") > 0.2
    )  # each character a word


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="--near-duplicates needs the package datasketch.*pip install"):
        require_minhash("--near-duplicates")


def test_a_seed_of_any_size_gives_signatures() -> None:
    pytest.importorskip("datasketch")
    text, signed = " ".join(words_of(50, seed=1)), []
    for seed in (RULES.seed, (1 << 32) + 2, (1 << 64) + 7):
        signed.append(signer(replace(RULES, seed=seed))(text))
    assert len(set(signed)) == 3 and {len(signature) for signature in signed} == {RULES.hashes}

"""The head of a model card, as huggingface_hub reads it again; what a base's card says."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mlpmem_ds.engines import model_cards
from mlpmem_ds.engines.model_cards import CardFacts, CardFigure, card_head, facts_of


def test_what_is_written_is_what_the_hub_reads() -> None:
    facts = CardFacts(license="other", license_name="the-base-licence", language=("en", "de"))
    figures = [
        CardFigure(
            metric="perplexity", name="perplexity at λ 0.3", value=9.5, dataset="My Text", split="test"
        ),
        CardFigure(metric="bits_per_byte", name="bits a byte", value=0.9, dataset="My Text", split="test"),
    ]
    head = card_head(title="a with b", base_model="some/a", facts=facts, tags=["x", "y"], figures=figures)
    card = ModelCard(f"{head}\n\n# a with b\n")  # refuses figures that it cannot read
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers",
        "text-generation",
        "some/a",
    )
    assert (data.license, data.license_name, data.language) == ("other", "the-base-licence", ["en", "de"])
    assert data.tags == ["x", "y"] and data.model_name == "a with b"
    found = [
        (each.task_type, each.dataset_name, each.dataset_split, each.metric_type, each.metric_value)
        for each in data.eval_results
    ]
    assert found == [
        ("text-generation", "My Text", "test", "perplexity", 9.5),
        ("text-generation", "My Text", "test", "bits_per_byte", 0.9),
    ]
    assert card.text.strip() == "# a with b"


def test_what_is_not_known_is_left_out() -> None:
    head = card_head(title="t", base_model=None, facts=CardFacts(), tags=["x"], figures=[])
    assert ModelCard(head + "\n").data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["x"],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "---\nlicense: apache-2.0\nlanguage: en\n---\n# A",
            CardFacts(license="apache-2.0", language=("en",)),
        ),
        (
            "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x\nlanguage: [en, de]\n---\n",
            CardFacts(license="other", license_name="gemma", license_link="https://x", language=("en", "de")),
        ),
        ("# No block at all\n", CardFacts()),
        ("---\nlicense: [unclosed\n---\n", None),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            CardFacts(license="other", license_name="own"),
        ),
        (None, CardFacts()),
    ],
)
def test_what_a_bases_card_says(text: str | None, expected: CardFacts | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert facts_of(str(tmp_path)) == expected


def test_what_is_said_is_plain_json() -> None:
    assert CardFacts(license="mit", language=("en",)).stated() == {"license": "mit", "language": ["en"]}
    assert CardFacts().stated() == {}


def test_a_card_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A licence next to the card has its address there; no card is other than one that says nothing."""
    (tmp_path / "README.md").write_text("---\nlicense_link: ./LICENSE\n---\n")
    for found in (tmp_path / "README.md", None):
        monkeypatch.setattr(model_cards, "model_file", lambda *_, found=found: found)
        facts = facts_of("some/base")
        if found is None:
            assert facts is None
        else:
            assert facts.license_link == "https://huggingface.co/some/base/resolve/main/LICENSE"

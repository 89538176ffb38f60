"""What the Hub reads of a model card: the block of YAML at the head of a README.md, with huggingface_hub.

Place in the pipeline: `convert_checkpoint` writes the card of an export, and takes licence and languages from
the card of its base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url

from mlpmem_ds.engines.model_files import model_file


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a base's card says; None or nothing where it does not say it."""

    license: str | None = None
    """an identifier of the Hub, such as apache-2.0"""
    license_name: str | None = None
    """of a licence that the Hub has no identifier for (`license` is then other)"""
    license_link: str | None = None
    """an address"""
    language: tuple[str, ...] = ()
    """ISO 639 codes"""

    def stated(self) -> dict[str, Any]:
        """What is said, as plain JSON."""
        values = {**asdict(self), "language": list(self.language)}
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, kw_only=True)
class CardFigure:
    """A number that was measured on a text."""

    metric: str
    """the Hub's name of it, such as perplexity"""
    name: str
    """for the reader"""
    value: float
    dataset: str
    split: str


def facts_of(name_or_path: str) -> CardFacts | None:
    """What the card of a model says, in a directory or on the Hub; nothing where a directory has no card.
    None: it cannot be read, as without the network, or is damaged."""
    path = model_file(name_or_path, "README.md")
    if path is None:
        return CardFacts() if Path(name_or_path).is_dir() else None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML that is damaged has errors of several families
        return None
    language = found.get("language") or ()
    return CardFacts(
        license=_text(found.get("license")),
        license_name=_text(found.get("license_name")),
        license_link=_address(_text(found.get("license_link")), name_or_path),
        language=(language,) if isinstance(language, str) else tuple(map(str, language)),
    )


def _address(link: str | None, name_or_path: str) -> str | None:
    """A link that may name a file next to the card; None where that file has no address."""
    if link is None or "://" in link:
        return link
    return None if Path(name_or_path).exists() else hf_hub_url(name_or_path, link.removeprefix("./"))


def _text(value: object) -> str | None:
    return str(value) if value else None


def card_head(
    *,
    title: str,
    base_model: str | None,
    facts: CardFacts,
    tags: Sequence[str],
    figures: Sequence[CardFigure],
) -> str:
    """The block of YAML with its two lines of dashes.

    Args:
        title: of the model, which the figures are listed under.
        base_model: a name on the Hub; None: there is none.
        facts: licence and languages of the export.
        tags: by which the Hub's users find it.
        figures: the first of each metric, text and split is taken by the Hub as the model's.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=figure.dataset.replace(" ", "-").lower(),
            dataset_name=figure.dataset,
            dataset_split=figure.split,
            metric_type=figure.metric,
            metric_name=figure.name,
            metric_value=float(figure.value),
        )
        for figure in figures
    ]
    fields: Mapping[str, object] = {
        "base_model": base_model,
        "license": facts.license,
        "license_name": facts.license_name,
        "license_link": facts.license_link,
        "language": list(facts.language) or None,
    }
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(tags),
        model_name=title if results else None,
        eval_results=results or None,
        **{name: value for name, value in fields.items() if value is not None},  # type: ignore[arg-type]
    )
    return f"---\n{data.to_yaml()}\n---"

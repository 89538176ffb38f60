"""The model card of a loaded export, which stays with the model when that is saved, or pushed to the Hub.

transformers saves a model without a card, and pushes a blank one where the repository has none. Here the card
of the directory or Hub model that was loaded takes that place. One that the directory or the repository has
already stays, as with any model of transformers.

Saving asks no network: it would wait for it where there is none. A push needs it in any case.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import hub

_NAME = "README.md"
_BLANK = "This model card has been automatically generated"
"""a sentence of the card that transformers makes for a repository without one"""


def keep_card(model: PreTrainedModel, directory: str | Path) -> None:
    """Give the directory that a model was saved into the card of what was loaded, if it has none."""
    target = Path(directory) / _NAME
    if not target.exists() and (card := _card_of(model, is_online=False)) is not None:
        target.write_text(card, encoding="utf-8")


def replace_blank_card(model: PreTrainedModel, directory: str | Path) -> None:
    """Put the card of what was loaded in the place of the blank one that transformers has written, with its
    tags."""
    target = Path(directory) / _NAME
    if not target.is_file() or _BLANK not in (blank := target.read_text(encoding="utf-8")):
        return
    if (card := _card_of(model, is_online=True)) is None:
        return
    restored: Any = hub.ModelCard(card, ignore_metadata_errors=True)
    tags = hub.ModelCard(blank).data.tags or []  # type: ignore[attr-defined]
    if new := [tag for tag in tags if tag not in (restored.data.tags or [])]:
        restored.data.tags = [*(restored.data.tags or []), *new]
        card = str(restored)
    target.write_text(card, encoding="utf-8")


def _card_of(model: PreTrainedModel, *, is_online: bool) -> str | None:
    """The card of the directory or Hub model that a model was loaded from; None where there is none, or none
    that can be read. Without `is_online` only the Hub's cache on this disk is asked."""
    config: Any = model.config
    name = str(config.name_or_path or "")
    if not name:  # joined here, from a base and a memory
        return None
    try:
        if Path(name).exists():
            return (Path(name) / _NAME).read_text(encoding="utf-8")
        revision = getattr(config, "_commit_hash", None)
        found = hub.cached_file(
            name,
            _NAME,
            revision=revision,
            local_files_only=not is_online,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if found is None else Path(str(found)).read_text(encoding="utf-8")
    except Exception:
        # The Hub and its network raise families of their own; the weights are there in any case.
        return None

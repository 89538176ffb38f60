"""The card of an export that is loaded, saved and pushed; the Hub's calls are answered here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import hub
from transformers.utils.hub import create_and_tag_model_card

from mlpmem_ds.models.capture_point import CapturePoint

from ..joint_models import joined
from .conftest import tiny_base, tiny_memory

CARD = "---\nlicense: mit\ntags:\n- mlp-memory\n---\n\n# A base with an MLP memory\n\nMemorization: …\n"
THEIRS = "---\nlicense: mit\n---\n\n# Edited on the Hub\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved joint model with a card."""
    root = tmp_path_factory.mktemp("exported")
    point = CapturePoint(layer=-2)
    joint = joined(tiny_base("gpt2"), tiny_memory(), lmbda=0.4, input_point=point)
    joint.save_pretrained(root)
    assert not (root / "README.md").exists()  # joined here: there is none to keep
    (root / "README.md").write_text(CARD, encoding="utf-8")
    return root


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """pushed(call, card=…): what `call` sends to a repository with this card, or with none."""
    sent: dict[str, str] = {}

    def create_commit(*, operations: Any, **_: Any) -> None:
        for each in operations:
            if each.path_in_repo.endswith((".md", ".json", ".py")):
                sent[each.path_in_repo] = Path(each.path_or_fileobj).read_text(encoding="utf-8")

    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id), create_commit=create_commit
    )

    def push(call: Callable[[], Any], card: str | None = None) -> dict[str, str]:
        def load(repo_id: str, **_: Any) -> Any:
            if card is None:
                raise hub.EntryNotFoundError("404")
            return hub.ModelCard(card)

        monkeypatch.setattr(hub.ModelCard, "load", load)
        sent.clear()
        call()
        return dict(sent)

    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: api)
    return push


def test_a_saved_model_keeps_its_card_and_replaces_none(exported: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == CARD
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("# The user's\n")
    loaded.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text() == "# The user's\n"
    loaded.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()


def test_a_pushed_model_keeps_its_card(exported: Path, pushed: Callable[..., dict[str, str]]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    sent = pushed(lambda: loaded.push_to_hub("you/model"))
    assert sent["README.md"] == CARD and {"config.json", "hf.py"} <= set(sent)
    tagged = pushed(lambda: loaded.push_to_hub("you/model", tags=["mlp-memory", "novels"]))["README.md"]
    assert hub.ModelCard(tagged).data.tags == ["mlp-memory", "novels"]
    assert tagged.partition("\n# ")[2] == CARD.partition("\n# ")[2]


def test_the_card_of_a_repository_stays(exported: Path, pushed: Callable[..., dict[str, str]]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert pushed(lambda: loaded.push_to_hub("you/model"), card=THEIRS)["README.md"] == THEIRS


def test_a_blank_card_of_a_repository_does_not(exported: Path, pushed: Callable[..., dict[str, str]]) -> None:
    """One that an earlier push by transformers left there."""
    blank: list[str] = []
    pushed(lambda: blank.append(str(create_and_tag_model_card("you/model"))))
    assert "[More Information Needed]" in blank[0]
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    assert pushed(lambda: loaded.push_to_hub("you/model"), card=blank[0])["README.md"] == CARD


def test_saving_with_a_push_keeps_it_too(
    exported: Path, tmp_path: Path, pushed: Callable[..., dict[str, str]]
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    place = tmp_path / "model"
    sent = pushed(lambda: loaded.save_pretrained(place, push_to_hub=True, repo_id="you/model"))
    assert sent["README.md"] == CARD == (place / "README.md").read_text(encoding="utf-8")


def test_an_export_of_the_hub_gives_the_card_of_its_revision(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pushed: Callable[..., dict[str, str]],
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    loaded.config.name_or_path, loaded.config._commit_hash = "you/model", "1234"
    asked = []

    def cached_file(name: str, file: str, *, revision: str, local_files_only: bool, **_: Any) -> str | None:
        asked.append((name, file, revision, local_files_only))
        return str(exported / "README.md")

    monkeypatch.setattr(hub, "cached_file", cached_file)
    loaded.save_pretrained(tmp_path / "again")
    assert asked == [("you/model", "README.md", "1234", True)]
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == CARD
    assert pushed(lambda: loaded.push_to_hub("you/model"))["README.md"] == CARD
    assert asked[1:] == [("you/model", "README.md", "1234", True), ("you/model", "README.md", "1234", False)]


class BrokenNetworkError(Exception):
    """As httpx raises: no OSError."""


def test_saving_asks_no_network_and_none_is_no_failure(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pushed: Callable[..., dict[str, str]],
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    loaded.config.name_or_path, loaded.config._commit_hash = "you/model", "0123456789" * 4
    asked: list[str] = []

    def request(*_: Any, url: str, **__: Any) -> Any:
        asked.append(url)
        raise BrokenNetworkError

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", request)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    loaded.save_pretrained(tmp_path / "saved")
    assert asked == [] and not (tmp_path / "saved" / "README.md").exists()
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    blank = pushed(lambda: loaded.push_to_hub("you/model"))["README.md"]
    assert "[More Information Needed]" in blank and all("you/model" in url for url in asked) and asked
    snapshot = tmp_path / "cache" / "models--you--model" / "snapshots" / loaded.config._commit_hash
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(CARD, encoding="utf-8")
    loaded.save_pretrained(tmp_path / "with its card")
    assert (tmp_path / "with its card" / "README.md").read_text(encoding="utf-8") == CARD


def test_a_model_that_was_joined_here_is_pushed_with_transformers_blank_card(
    pushed: Callable[..., dict[str, str]],
) -> None:
    point = CapturePoint(layer=-2)
    joint = joined(tiny_base("gpt2"), tiny_memory(), lmbda=0.4, input_point=point)
    assert "[More Information Needed]" in pushed(lambda: joint.push_to_hub("you/model"))["README.md"]

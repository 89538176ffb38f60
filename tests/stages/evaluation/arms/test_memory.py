"""What the report says of a memory: what it was trained for, if it is a control, which stages made it."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_ds.core.files import sha256_of_file
from mlpmem_ds.stages.evaluation.arms import memory
from mlpmem_ds.stages.evaluation.arms.memory import memory_description

from ....manifests import make_provenance
from ..conftest import save_targets


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "imitation", "alpha": 0.5}, "was trained to imitate the retriever and needs"),
        ({"objective": None}, "was trained to imitate the retriever and needs"),
        (
            {"objective": "helpful", "alpha": 0.5},
            "imitate the retriever where it is better than the base and",
        ),
        ({"objective": "helpful", "alpha": 0.0}, "on the text alone, without the retriever"),
        ({"control": "random-memory", "alpha": 0.5}, "a control: .* was not trained at all"),
        ({"control": "permuted-targets", "alpha": 0.5}, "a control: .* targets of other positions"),
    ],
)
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_memory_is_described_by_what_it_was_trained_for(changes, said, weights):
    text = memory_description(make_provenance(**changes), weights)
    assert re.search(said, text) and ("int8" in text) == (weights == "int8")


def save_run(root: Path, *, search: str = "ivf") -> dict[str, str]:
    """Stages of a run; the hashes of those that its memory is trained on."""
    for name in ("keys", "index", "memory"):
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").write_text(f"{root} {name}")
    hashes = {name: sha256_of_file(root / name / "manifest.json") for name in ("keys", "index")}
    save_targets(root / "targets", hashes["keys"], index_sha256=hashes["index"], search=search)
    return {"keys": hashes["keys"], "targets": sha256_of_file(root / "targets" / "manifest.json")}


def stages_of(root: Path, given: Path | None, *, is_training: bool = True, **provenance: Any) -> set[Any]:
    """What is added up for a memory where the flags name the stages of the run `given`."""
    stored: Any = SimpleNamespace(
        root=root, is_training=is_training, provenance=make_provenance(**{"alpha": 0.5, **provenance})
    )
    names = ("keys", "index", "targets")
    config: Any = SimpleNamespace(**{name: given and given / name for name in names})
    return set(memory._stages(stored, config))


def test_a_memorys_price_is_of_the_stages_that_made_it(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ones, twos = save_run(one), save_run(two, search="exact")
    moved = Path(shutil.copytree(one / "memory", tmp_path / "moved" / "memory"))
    names = ("keys", "index", "targets")
    assert stages_of(moved, one, **ones) == {moved, *(one / name for name in names)}
    assert stages_of(moved, one, **{**ones, "alpha": 0}) == {moved, one / "keys"}
    assert None in stages_of(moved, two, **ones) and None in stages_of(moved, None, **ones)
    # In its run's own layout its stages are found, whatever is given.
    found = {two / "memory", two / "keys", two / "targets"}
    assert stages_of(two / "memory", one, **twos) == stages_of(two / "memory", None, **twos) == found


def test_what_made_a_memory_and_is_not_there_leaves_its_price_open(tmp_path: Path) -> None:
    hashes, root = save_run(tmp_path / "run"), tmp_path / "run" / "memory"
    assert None in stages_of(root, None, init_from="a" * 64, **hashes)
    assert None in stages_of(root, None, is_training=False, **hashes)
    assert stages_of(root, None, control="random-memory", **hashes) == {root}
    shutil.rmtree(tmp_path / "run" / "index")
    assert None in stages_of(root, None, **hashes)

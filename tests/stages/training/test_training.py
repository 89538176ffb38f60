"""A training and the copies of its checkpoints: OUTPUT is lost, they are of another training, or discarded.

The ranks of every start are forked from one process that has imported DeepSpeed
(tests/stages/forked_training.py).
"""

import shutil

import pytest

from mlpmem_ds.core.files import publish_json, read_sealed_json
from mlpmem_ds.formats.checkpoint import fault_of_checkpoint, list_checkpoints

FLAGS = {
    "alpha": 0.0,
    "epochs": 1.0,
    "batch_positions": 96,
    "hidden_size": 16,
    "num_blocks": 2,
    "learning_rate": 0.01,
    "log_every_steps": 1,
    "save_every_steps": 5,
    "keep_checkpoints": 9,
    "validate_every": None,
}
DIVERGING = {"learning_rate": 3.0, "schedule": "constant", "early_stopping_patience": None, "select": "best"}
"""its best validation comes early"""


@pytest.fixture(scope="module")
def runs(make_runs, corpus_dir, keys_dir):
    return make_runs({**FLAGS, "corpus": corpus_dir, "keys": keys_dir})


@pytest.fixture(scope="module")
def validated(base_dir):
    """Flags of a training whose best weights come early."""
    return {**DIVERGING, "model": base_dir, "validate_every": 2, "validation_positions": 100}


@pytest.fixture(scope="module")
def straight(runs, validated):
    """Trainings that nothing disturbs, with their copies."""
    runs.succeed(
        runs.start("plain", 2, copy_to=runs / "plain-copies"),
        runs.start("best", 2, copy_to=runs / "best-copies", **validated),
        runs.start(
            "best-two", 2, copy_to=runs / "best-two-copies", size=2, bytes_of_weights=5000, **validated
        ),
    )
    return runs


def copies_until(runs, source, target, step):
    """The copies of a training as they were when `step` had been copied."""
    for path in list_checkpoints(runs / source):
        if path.name <= f"step-{step:08d}":
            shutil.copytree(path, runs / target / path.name)
    return runs / target


def steps_in(place):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(place)]


def without_run(path):
    """A checkpoint as programs wrote it before checkpoints named their run."""
    manifest = read_sealed_json(path / "manifest.json")
    assert len(manifest["subject"].pop("identity")) == 64
    publish_json(path / "manifest.json", manifest, seal=True)


def test_copies_of_a_training_with_other_flags_are_refused_and_stay(straight):
    """Its learning rate, its seed and its schedule are in no shape of a memory."""
    runs, copies = straight, straight / "plain-copies"
    names = steps_in(copies)
    flags = (
        {"learning_rate": 0.02},
        {"schedule": "constant"},
        {"weight_decay": 0.0},
        {"resume": "never", "seed": 1},
    )
    steps = [runs.start(f"other-{n}", 2, copy_to=copies, **changes) for n, changes in enumerate(flags)]
    results, said = runs.run(*steps)
    assert results == [[2]] * len(flags), "".join(said)
    assert all(
        "is of another training" in words and "its own --output and --copy-to" in words for words in said
    )
    assert steps_in(copies) == names and all(
        fault_of_checkpoint(path) is None for path in list_checkpoints(copies)
    )


def test_a_running_training_does_not_clear_the_copies_of_another(straight):
    """Its own checkpoint is newer than theirs, which would be removed as older ones."""
    runs = straight
    copies = copies_until(runs, "plain-copies", "earlier-copies", 5)
    slower = {"learning_rate": 0.001, "keep_checkpoints": 1}
    runs.succeed(runs.start("slower", 2, **slower))
    runs.unfinish("slower")
    results, said = runs.run(runs.start("slower", 2, copy_to=copies, **slower))
    assert results == [[2]] and "is of another training" in said[0]
    assert steps_in(copies) == [5]


def test_a_lost_output_is_continued_from_its_copies(straight):
    """Also from those of a program that did not name the run in them, which is said."""
    runs = straight
    places = [copies_until(runs, "plain-copies", f"{name}-copies", 10) for name in ("lost", "unnamed")]
    for path in list_checkpoints(places[1]):
        without_run(path)
    said = runs.succeed(
        runs.start("lost", 2, copy_to=places[0]),
        runs.start("unnamed", 2, copy_to=places[1]),
    )
    for name, words in zip(("lost", "unnamed"), said, strict=True):
        assert f"resuming from {runs / f'{name}-copies'}" in words and "(step 10)" in words
        runs.assert_same_weights(name, "plain")
    assert ["does not name its flags" in words for words in said] == [False, True]


def test_own_checkpoints_that_do_not_name_the_run_are_continued(straight):
    runs = straight
    runs.rewind("plain", "older", 5)
    for path in list_checkpoints(runs / "older" / "checkpoints"):
        without_run(path)
    (said,) = runs.succeed(runs.start("older", 2, copy_to=runs / "older-copies"))
    assert "(step 5)" in said and "does not name its flags" not in said
    runs.assert_same_weights("older", "plain")


def test_a_training_goes_on_where_its_flags_are_given_in_another_way(straight):
    """By a recipe, and then themselves."""
    runs = straight
    said = runs.succeed(
        runs.start("by-recipe", 2, recipe="paper", stop_after_seconds=1e-3),
        runs.start("by-recipe", 2),
    )
    assert "(step 3)" in said[1]
    runs.assert_same_weights("by-recipe", "plain")


@pytest.mark.parametrize("size", [1, 2])
def test_a_base_does_not_continue_the_copies_of_another_seed(make_runs, corpus_dir, size):
    flags = {"corpus": corpus_dir, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "batch_tokens": 256}
    bases = make_runs(
        {**flags, "steps": 4, "learning_rate": 0.01, "validate_every": None, "early_stopping_patience": None},
        stage="train_base",
    )
    results, said = bases.run(
        bases.start("first", 2, copy_to=bases / "copies", size=size),
        bases.start("second", 2, copy_to=bases / "copies", size=size, seed=1),
    )
    assert results == [[0] * size, [2] * size], "".join(said)
    assert "is of another training (it has other flags or inputs)" in said[1]


def test_resume_never_discards_the_copies_too(straight):
    """Then the new training's are kept, and it is they that are resumed."""
    runs = straight
    for name in ("anew", "anew-copies"):
        shutil.copytree(runs / name.replace("anew", "plain"), runs / name)
    runs.unfinish("anew")
    copies = runs / "anew-copies"
    (copies / "step-00000005").rename(copies / "step-00000005.damaged")
    (copies / "step-00000010").rename(copies / ".step-00000010.former")
    flags = {"copy_to": copies, "keep_checkpoints": 1}
    said = runs.succeed(
        runs.start("anew", 2, **flags, resume="never", stop_after_seconds=1e-3),
        runs.start("anew", 2, **flags, stop_after_seconds=1e-3),
        runs.start("anew", 2, **flags),
    )
    assert f"--resume never: discarding {copies}" in said[0] and "saved at step 3 of" in said[0]
    assert "(step 3)" in said[1] and "(step 6)" in said[2]
    runs.assert_same_weights("anew", "plain")
    (newest,) = list_checkpoints(copies)
    assert newest.name == list_checkpoints(runs / "anew" / "checkpoints")[0].name
    assert [path.name for path in copies.iterdir()] == [newest.name]


@pytest.mark.parametrize(("name", "size"), [("best", 1), ("best-two", 2)])
def test_the_best_weights_come_back_with_a_copy(straight, validated, name, size):
    """Those of a straight run, byte for byte, in one file and in several."""
    runs = straight
    training = runs.manifest(name)["training"]
    assert training["selected_step"] <= 10 < training["steps"]
    copies = copies_until(runs, f"{name}-copies", f"{name}-lost-copies", 10)
    more = {"bytes_of_weights": 5000} if size == 2 else {}
    (said,) = runs.succeed(runs.start(f"{name}-lost", 2, copy_to=copies, size=size, **validated, **more))
    assert f"resuming from {copies}" in said and "(step 10)" in said
    names = [str(path.relative_to(runs / name)) for path in (runs / name / "best").iterdir()]
    assert len(names) == 1 if size == 1 else len(names) > 2
    weights = [str(path.relative_to(runs / name)) for path in (runs / name / "weights").iterdir()]
    for file in ("best.json", *names, *weights):
        assert (runs / f"{name}-lost" / file).read_bytes() == (runs / name / file).read_bytes(), file
    assert runs.manifest(f"{name}-lost")["training"] == training


def test_best_weights_that_are_nowhere_are_forgotten_with_a_warning(straight, validated):
    """Of copies of a program that did not copy them; the training ends with the best of what is left."""
    runs = straight
    copies = copies_until(runs, "best-copies", "bare-copies", 10)
    for path in list_checkpoints(copies):
        manifest = read_sealed_json(path / "manifest.json")
        manifest["files"] = [file for file in manifest["files"] if not file["name"].startswith("best/")]
        shutil.rmtree(path / "best")
        publish_json(path / "manifest.json", manifest, seal=True)
    (said,) = runs.succeed(runs.start("bare", 2, copy_to=copies, **validated))
    assert "the weights of the best validation" in said and "are forgotten" in said
    training, whole = runs.manifest("bare")["training"], runs.manifest("best")["training"]
    later = [validation for validation in whole["validations"] if validation["step"] > 10]
    assert training["validations"] == later
    assert training["selected_step"] == min(later, key=lambda each: each["perplexity"])["step"]

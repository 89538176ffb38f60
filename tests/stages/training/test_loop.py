"""The schedules; what a training says of itself; its picture."""

import itertools
import json
import logging
import math
import sys
import types

import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.training import training
from mlpmem_ds.stages.training.curves import draw_curves
from mlpmem_ds.stages.training.loop import Hooks, LoopSettings, _Interval, run_steps
from mlpmem_ds.stages.training.metrics import Metrics, progress_note, read_metrics
from mlpmem_ds.stages.training.parts import Steps
from mlpmem_ds.stages.training.schedule import learning_rate_at
from mlpmem_ds.stages.training.validation import BestWeights, Validation


def test_rank_0_says_whether_a_training_is_complete(tmp_path, monkeypatch):
    """The others' client may not see the manifest yet, and none of them reads the weights."""
    answers, asked = [], []

    def gather(value, world):
        answers.append(value)
        return [answers[0]]

    def look(rank, is_there, fault):
        def ask(unit):
            asked.append(rank)
            return fault

        manifest = types.SimpleNamespace(is_file=lambda: is_there)
        directory = types.SimpleNamespace(
            world=World(rank=rank, size=2), manifest_path=manifest, records=types.SimpleNamespace(fault=ask)
        )
        options = types.SimpleNamespace(resume="auto", output=tmp_path)
        return training.is_complete(directory, options)

    monkeypatch.setattr(training, "gather_values", gather)
    for is_there, fault, expected in ((True, None, True), (True, "cut short", False), (False, None, False)):
        answers.clear()
        assert look(0, is_there, fault) is look(1, not is_there, None) is expected
    assert asked == [0, 0]


def rates(schedule, **changes):
    settings = {"peak": 2.0, "num_steps": 110, "warmup_steps": 10, "schedule": schedule, **changes}
    return [learning_rate_at(step, **settings) for step in range(110)]


def test_schedules():
    for schedule in ("cosine", "linear", "wsd", "constant"):
        rates_of_steps = rates(schedule)
        assert rates_of_steps[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
        assert rates_of_steps[10] == pytest.approx(2.0) and max(rates_of_steps) <= 2.0
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates_of_steps[10:]))
    assert rates("cosine")[60] == pytest.approx(1.1) and rates("cosine")[109] == pytest.approx(0.2, abs=1e-3)
    assert rates("linear")[60] == pytest.approx(1.0) and rates("linear")[109] == pytest.approx(0.02)
    assert (
        rates("wsd")[89] == 2.0
        and rates("wsd")[100] == pytest.approx(1.0)
        and rates("wsd")[109] == pytest.approx(0.1)
    )
    assert rates("wsd", decay_share=0.5)[85] == pytest.approx(1.0) and rates("wsd", decay_share=0.0) == rates(
        "constant"
    )


class FakeWandb(types.ModuleType):
    """Notes what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged = [], []

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")


def test_metrics_are_written_once_a_step_and_to_wandb_if_asked(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    first = Metrics(tmp_path, World(), 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": step / 2})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')  # cut short by a crash
    again = Metrics(tmp_path, World(), 2, wandb_project="memory", run_id="abc", description={"alpha": 0.5})
    again.write(3, {"loss": float("nan"), "kl": 1.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, None),
    ]
    assert wandb.started[0]["project"] == "memory" and wandb.started[0]["id"] == "abc"
    assert wandb.logged == [(3, {"kl": 1.0}), "finished"]
    Metrics(tmp_path / "nowhere", World(rank=1, size=2), 0).write(1, {"loss": 1.0})
    assert not (tmp_path / "nowhere").exists()


def test_the_note_names_what_is_there(caplog):
    values = {
        "loss": 2.0,
        "learning_rate": 1e-3,
        "data_wait_share": 0.25,
        "memory_bytes": 2e9,
        "skipped_steps": 0.0,
    }
    assert progress_note(values) == "loss 2, lr 0.001, wait 25%, 2.00 GB"
    note = progress_note({**values, "mfu": 0.5, "skipped_steps": 3.0})
    assert "MFU 50%" in note and "SKIPPED 3 steps" in note


def test_curves(tmp_path, drawn_pictures):
    assert not draw_curves(tmp_path) and not (tmp_path / "curves.png").exists()
    lines = [{"step": step, "loss": 1 / step, "kl": None if step == 2 else 1.0} for step in (1, 2, 3)]
    lines += [{"step": 3, "validation_perplexity": 9.0, "validation_base_perplexity": 10.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    assert draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def run_skipping(*skips, max_skipped):
    """Steps of an engine without gradients, of which these are not finite."""
    engine = types.SimpleNamespace(skipped_steps=0, is_first=True)

    def train_step(micro_batches, rate):
        engine.skipped_steps += skips[micro_batches[0][0]]
        return [(torch.zeros(1),)]

    engine.train_step = train_step
    return run_steps(
        engine,
        iter([([(step,)], 0.0) for step in range(len(skips))]),
        first=0,
        settings=LoopSettings(
            steps=Steps(count=len(skips), rows=1),
            rows="tokens",
            sums=(),
            learning_rate=lambda step: 1.0,
            log_every=99,
            save_every=99,
            max_skipped=max_skipped,
        ),
        hooks=Hooks(save=lambda *_: None, validate=None, explain=lambda step: ""),
        stop_request=types.SimpleNamespace(agreed=lambda *late: (False, *late)),
        progress=types.SimpleNamespace(advance=lambda rows, note: None),
        metrics=types.SimpleNamespace(write=lambda done, values: None),
    )


@pytest.mark.parametrize("skips", [(1, 1), (0, 1, 1, 1)])
def test_a_training_that_learns_nothing_is_not_complete(skips, monkeypatch):
    """Too many steps in a row, and all steps of one that has fewer."""
    values = {"data_wait_share": 0.0, "memory_bytes": 1.0, "skipped_steps": 2.0}
    monkeypatch.setattr(_Interval, "close", lambda self, rate: values)
    with pytest.raises(UserError, match=r"not finite, as in the \d steps before it: nothing is learnt"):
        run_skipping(*skips, max_skipped=3)
    assert run_skipping(*skips, max_skipped=None).is_over
    assert run_skipping(0, *skips, 0, max_skipped=4).is_over


def history_of(*perplexities):
    best = BestWeights(None)  # type: ignore[arg-type]
    best.history = [
        Validation(step=step, perplexity=value, details={"base_perplexity": 9.0})
        for step, value in enumerate(perplexities)
    ]
    return best


def test_patience_counts_validations_since_the_best():
    assert history_of(5, 4, 4, 4.5).best.step == 1
    assert not history_of().has_stalled(1) and history_of().best is None
    assert [history_of(5, 4, 4, 4.5).has_stalled(patience) for patience in (None, 1, 2, 3)] == [
        False,
        True,
        True,
        False,
    ]


def test_validations_are_kept_as_json():
    history = history_of(1.0, math.inf)
    assert history.best.step == 0
    entries = history.to_json()
    assert entries == [
        {"step": 0, "perplexity": 1.0, "base_perplexity": 9.0},
        {"step": 1, "perplexity": None, "base_perplexity": 9.0},
    ]
    again = BestWeights(None, entries)  # type: ignore[arg-type]
    assert again.history[0] == history.history[0] and math.isnan(again.history[1].perplexity)
    assert again.to_json() == entries
    assert str(history.history[0]) == "tuning perplexity 1.000 (base perplexity 9)"
    assert history.history[0].metrics() == {
        "validation_perplexity": 1.0,
        "validation_base_perplexity": 9.0,
    }

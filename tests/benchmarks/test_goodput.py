"""`bench goodput` at a few seconds' size: kills hit, the outputs are the same bytes, nothing is left."""

import json
from pathlib import Path

from mlpmem_ds.benchmarks.goodput import Config, LostSteps, commands_of, ratios_of, rows_of, run
from mlpmem_ds.core.world import World


def config(output: Path, **changes: object) -> Config:
    return Config(
        output=output,
        **{
            "jobs": ("targets",),
            "kill_every_seconds": 1.5,
            "max_kills": 3,
            "positions": 4096,
            "train_positions": 1024,
            "shard_positions": 1024,
            "dim": 16,
            "vocab_size": 64,
            "k": 8,
            **changes,
        },  # type: ignore[arg-type]
    )


def test_targets_under_kills_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    run(config(tmp_path / "goodput"), World())
    report = json.loads((tmp_path / "goodput" / "goodput.json").read_text())
    assert {row["arm"] for row in report["rows"]} == {"targets undisturbed", "targets killed"}
    ratios = report["ratios"]
    assert ratios["identical"] == 1 and ratios["orphans"] == ratios["leftovers"] == 0
    undisturbed, killed = report["runs"]["each"]
    assert undisturbed["kills"] == [] and 1 <= len(killed["kills"]) <= 3
    assert ratios["targets_goodput"] == undisturbed["seconds"] / killed["seconds"]

    run(config(tmp_path / "goodput"), World())  # again: the runs are there
    again = json.loads((tmp_path / "goodput" / "goodput.json").read_text())
    assert again["runs"] == report["runs"]


def test_steps_since_the_newest_checkpoint_are_lost_and_counted_once(tmp_path: Path) -> None:
    look = LostSteps(tmp_path)
    assert look()["lost_steps"] == 0
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert look() == {"step": 7, "lost_steps": 3}
    assert look() == {"step": 7, "lost_steps": 0}  # killed before the next step


def test_ratios() -> None:
    def record(seconds: float, *lost: int) -> dict[str, object]:
        kills = [{"lost_steps": steps} for steps in lost]
        common = {"orphans": 0, "leftovers": 0, "sha256": "a", "is_killed": bool(lost)}
        return {"job": "train", "seconds": seconds, "kills": kills, **common}

    records = [record(100.0), record(150.0, 4, 10)]
    ratios = ratios_of(records, rows_of(records))
    assert ratios["train_goodput"] == 100 / 150 and ratios["train_seconds_per_kill"] == 25
    assert ratios["lost_steps_per_kill"] == 7 and ratios["max_lost_steps"] == 10


def test_each_job_has_its_loop(tmp_path: Path) -> None:
    made = {
        job: commands_of(config(tmp_path), job, tmp_path) for job in ("train", "train-elastic", "targets")
    }
    assert [len(made[job]) for job in made] == [1, 1, 2]
    assert "--max-restarts" in made["train-elastic"][0][0] and made["train"][0][0][0] == "bash"
    assert [variables["RANK"] for _, variables in made["targets"]] == ["0", "1"]

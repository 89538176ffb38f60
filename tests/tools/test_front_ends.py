"""Every front-end: thin, with a --help that shows an example, and a wrong input that ends in exit code 2 and
no files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FRONT_ENDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "launch")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
)
# What each needs to get as far as looking at its inputs, with one of them missing.
MISSING_INPUT = {
    "tools/prepare_corpus.py": ["--input", "MISSING", "--tokenizer", "train:300", "--output", "OUT"],
    "tools/fit_scaling.py": ["--reports", "MISSING", "--output", "OUT"],
    "tools/fetch_base.py": ["--gguf", "MISSING", "--output", "OUT"],
    "tools/train_base.py": ["--corpus", "MISSING", "--output", "OUT"],
    "tools/train_baseline.py": [
        "--kind",
        "continued",
        "--model",
        "MISSING",
        "--corpus",
        "MISSING",
        "--output",
        "OUT",
    ],
    "tools/extract_keys.py": ["--model", "MISSING", "--corpus", "MISSING", "--output", "OUT"],
    "tools/build_index.py": ["--keys", "MISSING", "--output", "OUT"],
    "tools/write_targets.py": ["--keys", "MISSING", "--output", "OUT"],
    "launch/train.py": [
        "--ds_config",
        "ds_configs/cpu.json",
        "--corpus",
        "MISSING",
        "--targets",
        "MISSING",
        "--output",
        "OUT",
    ],
    "launch/fit_gate.py": [
        *("--model", "MISSING", "--memory", "MISSING", "--corpus", "MISSING", "--output", "OUT"),
    ],
    "launch/evaluate.py": ["--model", "MISSING", "--corpus", "MISSING", "--output", "OUT"],
    "tools/convert_checkpoint.py": ["--checkpoint", "MISSING", "--model", "MISSING", "--output", "OUT"],
    "launch/generate.py": ["--model", "MISSING", "--prompt", "x"],
    "tools/inspect_run.py": ["MISSING"],
    "tools/plan.py": ["--positions", "1000", "--calibrate", "MISSING", "--output", "OUT"],
    "launch/answer_questions.py": ["--model", "MISSING", "--questions", "MISSING", "--output", "OUT"],
    "tools/run_lm_eval.py": ["--model", "MISSING", "--questions", "MISSING", "--output", "OUT"],
    "tools/import_datastore.py": ["--datastore", "MISSING", "--model", "MISSING", "--output", "OUT"],
    "tools/export_datastore.py": ["--keys", "MISSING", "--output", "OUT"],
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"front_end_{Path(name).stem}", ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(name).main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "example:" in text and name.split("/")[1] in text


@pytest.mark.parametrize("name", [name for name in FRONT_ENDS if name in MISSING_INPUT])
def test_a_missing_input_is_exit_code_2_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    places = {"MISSING": str(tmp_path / "missing"), "OUT": str(tmp_path / "out")}
    words = [places.get(word, word) for word in MISSING_INPUT[name]]
    assert load(name).main(words) == 2
    message = capsys.readouterr().err
    assert "error: " in message and str(tmp_path / "missing") in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_an_unknown_flag_is_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(name).main(["--no-such-flag", "1"])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["-I"], ["-OO"], ["-X", "dev"], ["-W", "error"]])
def test_a_checkout_runs_from_any_directory_and_with_any_flags_of_python(
    flags: list[str], tmp_path: Path
) -> None:
    """Not installed, without PYTHONPATH, from a directory with an odd name; `-OO` has no docstrings."""
    folder = tmp_path / "a 'b' \"c\" \u00fc $d"
    folder.mkdir()
    (folder / "tools").symlink_to(ROOT / "tools")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["tools/plan.py", "--help"]
    done = subprocess.run(
        [sys.executable, *flags, *words], cwd=folder, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "What a run will need" in done.stdout or "Say what a run" in done.stdout, done.stdout


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_front_ends_are_thin(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 45

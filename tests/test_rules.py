"""Rules of the whole tree: sizes, widths, nothing at import, typed manifests, plain words, a test a module.

Each rule is a function from a tree to its violations, and each is shown a planted violation. Who may import
whom is in test_floors.py. ALLOWED names the files that need not keep a rule, with the reason; PENDING those
that do not keep it yet.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
MAX_FUNCTION_LINES, MAX_FILE_LINES = 70, 450
MAX_WIDTH, MAX_PROSE_WIDTH = 110, 100
CODE = ("mlpmem_ds", "tools", "launch")
PROSE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "mlpmem_ds/formats/README.md",
    "ds_configs/README.md",
)

# word → what to say instead; in code, docstrings, messages and documents
WORDS = {
    r"at hand": "available, given, in memory",
    r"beside": "next to, with, in addition to (besides is allowed)",
    r"nobody": "no one, no file, no rank",
    r"whatever": "any, regardless of",
    r"came": "was given, was read, arrived, occurred",
    r"speaks?": "logs, reports",
    r"wanted": "requested, needed, expected",
    r"for want of": "because … is missing",
    r"(dear|dearer|dearest)": "costly",
    r"the dead": "killed ranks, ended processes",
    r"(?!at_|most_common)\w*(?<![a-z])(?<!at_)(most|least)_\w+": "max_, min_",
    r"\w*(?<!at)_(most|least)": "max_, min_",
    r"of_[a-z]\w*": "a noun: memory_scores, not of_memory",
    r"\w*(tokenis|quantis|normalis|initialis|optimis|serialis|organis|recognis|summaris)\w+": "-ize",
    r"(First|Second|Third|Fourth|Last) stage": "the name of the command",
    r"Of the (first|second|third|last) (stage|use)": "the name of the command",
}
# Names of variables that say nothing of what they hold.
EMPTY_NAMES = {"here", "there", "came", "known", "kept", "wanted"}

# module without a test of its own name → the test that covers it
TESTED_BY = {
    "benchmarks/common.py": "benchmarks/test_bench.py",
    "benchmarks/fuzz/archives.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/bounded.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/compression.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/config.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/csvs.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/documents.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/mutations.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/own_files.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/tables.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/target.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/tars.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/texts.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/trials.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/user_files.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/fuzz/zips.py": "benchmarks/fuzz/test_fuzz_readers.py",
    "benchmarks/gpu_check/figures.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/gpu_check/kernels.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/gpu_check/machine.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/gpu_check/made_up.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/gpu_check/pipeline.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/gpu_check/ranks.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/gpu_check/sizes.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/gpu_check/steps.py": "benchmarks/gpu_check/test_gpu_check.py",
    "benchmarks/loss_gpu.py": "benchmarks/test_loss.py",
    "benchmarks/made_up_corpus.py": "benchmarks/test_extract.py",
    "benchmarks/made_up_keys.py": "benchmarks/test_index.py",
    "benchmarks/quality/arms.py": "benchmarks/quality/test_plan.py",
    "benchmarks/quality/plots.py": "benchmarks/quality/test_results.py",
    "benchmarks/quality/presets.py": "benchmarks/quality/test_plan.py",
    "benchmarks/scaling/config.py": "benchmarks/scaling/test_points.py",
    "benchmarks/scaling/fit_scaling.py": "benchmarks/scaling/test_points.py",
    "benchmarks/scale/counted_calls.py": "benchmarks/scale/test_metadata.py",
    "benchmarks/plan.py": "benchmarks/test_index.py",
    "benchmarks/published_targets.py": "benchmarks/test_targets.py",
    "benchmarks/scale/index.py": "benchmarks/scale/test_scale.py",
    "benchmarks/scale/measure.py": "benchmarks/scale/test_scale.py",
    "benchmarks/scale/metadata.py": "benchmarks/scale/test_scale.py",
    "benchmarks/scale/operations.py": "maths/test_centroids.py",
    "benchmarks/scale/targets.py": "benchmarks/scale/test_scale.py",
    "benchmarks/target_fidelity.py": "benchmarks/test_targets.py",
    "commands.py": "test_commands.py",
    "core/objects/locks.py": "core/objects/test_push.py",
    "core/shipped.py": "test_commands.py",
    "core/errors.py": "core/test_front_end.py",
    "engines/collectives/heartbeat.py": "engines/collectives/test_torch_group.py",
    "engines/collectives/pairwise.py": "engines/collectives/test_torch_group.py",
    "engines/collectives/ranks.py": "engines/collectives/test_torch_group.py",
    "engines/deepspeed/library.py": "engines/deepspeed/test_engine.py",
    "engines/deepspeed/process_group.py": "engines/deepspeed/test_engine.py",
    "engines/deepspeed/weights.py": "stages/conversion/test_convert_checkpoint.py",
    "engines/deepspeed/saved_shards.py": "engines/deepspeed/test_zero_state.py",
    "engines/plotting.py": "stages/report/test_summary.py",
    "formats/arrow_library.py": "formats/test_table_readers.py",
    "formats/fetched_base.py": "stages/fetching/test_fetch_base.py",
    "formats/file_marks.py": "formats/test_table_readers.py",
    "formats/lists_directory.py": "stages/retrieval/test_key_lists.py",
    "formats/mapped_keys.py": "stages/retrieval/test_key_lists.py",
    "maths/device_memory.py": "maths/test_centroids.py",
    "maths/distances.py": "maths/test_knn.py",
    "maths/exact_limit.py": "maths/test_knn_on_device.py",
    "maths/hidden_on_device.py": "maths/test_knn_on_device.py",
    "maths/kernels/list_candidates.py": "maths/kernels/test_twins.py",
    "maths/kernels/probability_rows.py": "maths/kernels/test_twins.py",
    "maths/kernels/sparse_rows.py": "maths/kernels/test_twins.py",
    "maths/list_tiles.py": "maths/test_lists_on_device.py",
    "maths/listed_keys.py": "maths/test_knn.py",
    "maths/sparse_chunk.py": "maths/test_sparse_loss.py",
    "maths/sparse_targets.py": "maths/test_sparse_loss.py",
    "models/capture_point.py": "models/test_backbone.py",
    "models/hf_config.py": "models/test_hf.py",
    "models/memory_config.py": "models/test_memory.py",
    "models/mixture_on_device.py": "maths/kernels/test_twins.py",
    "models/structure.py": "models/test_backbone.py",
}

# rule → file that need not keep it → why
ALLOWED: dict[str, dict[str, str]] = {
    "long_functions": {
        "mlpmem_ds/maths/kernels/sparse_rows.py": "one Triton kernel, which has no inner functions",
    },
    "effects_of_import": {
        "mlpmem_ds/__init__.py": "refuses a Python that is too old to read the rest",
        "mlpmem_ds/models/hf.py": "registers its classes with transformers",
    },
    "untyped_manifests": {
        "mlpmem_ds/stages/inspection/contents.py": "reads the common fields of every format",
    },
}
# rule → files that do not keep it yet; it may only shrink
PENDING: dict[str, set[str]] = {}


class Violation(NamedTuple):
    path: str  # from the root
    message: str


Rule = Callable[[Path], Iterator[Violation]]


def python_files(root: Path, *folders: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of the Python files of these folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def text_files(root: Path, *patterns: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of the files of these patterns."""
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def long_functions(root: Path) -> Iterator[Violation]:
    for path, text in python_files(root, *CODE, "tests"):
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    yield Violation(path, f"{node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")


def long_files(root: Path) -> Iterator[Violation]:
    for path, text in python_files(root, *CODE, "tests"):
        if text.count("\n") > MAX_FILE_LINES:
            yield Violation(path, f"has {text.count(chr(10))} lines, at most {MAX_FILE_LINES}")


def wide_lines(root: Path) -> Iterator[Violation]:
    """Lines of code; a comment for a tool at the end (type: ignore, noqa) does not count."""
    for path, text in [*python_files(root, *CODE, "tests"), *text_files(root, "launch/**/*.sh")]:
        for number, line in enumerate(text.splitlines(), start=1):
            width = len(re.sub(r"  # (type: ignore|noqa).*$", "", line))
            if width > MAX_WIDTH:
                yield Violation(path, f"line {number} has {width} characters, at most {MAX_WIDTH}")


def wide_prose(root: Path) -> Iterator[Violation]:
    """Lines of Markdown, without tables, code blocks and the targets of links."""
    for path, text in text_files(root, *PROSE):
        is_code = False
        for number, line in enumerate(text.splitlines(), start=1):
            is_fence = line.lstrip().startswith("```")
            is_code ^= is_fence
            width = len(re.sub(r"\]\([^)]*\)|https?://\S+", "", line))
            if not (is_code or is_fence or line.startswith("|")) and width > MAX_PROSE_WIDTH:
                yield Violation(path, f"line {number} has {width} characters, at most {MAX_PROSE_WIDTH}")


def effects_of_import(root: Path) -> Iterator[Violation]:
    """Statements of a module that do something when it is imported; found by their form, so not all."""
    for path, text in python_files(root, *CODE):
        for node in parsed(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            is_block = isinstance(node, ast.For | ast.While | ast.With | ast.Try | ast.Delete)
            is_branch = isinstance(node, ast.If) and ast.unparse(node.test) not in PASSIVE_BRANCHES
            if is_call or is_block or is_branch or (not isinstance(node, ast.If) and has_effect(node)):
                shown = ast.unparse(node).splitlines()[0][:60]
                yield Violation(path, f"line {node.lineno} does something at import: {shown}")


PASSIVE_BRANCHES = ("__name__ == '__main__'", "TYPE_CHECKING")
EFFECTS = r"gc\.|os\.environ|os\.put|sys\.path|logging\.basicConfig|torch\.set_|open$|.*\.read_text$"


def has_effect(statement: ast.stmt) -> bool:
    """Whether an assignment calls what changes or reads the world, or is one to the environment."""
    calls = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    settings = [target for target in targets if isinstance(target, ast.Subscript | ast.Attribute)]
    return bool(settings) or any(re.match(EFFECTS, ast.unparse(call)) for call in calls)


def untyped_manifests(root: Path) -> Iterator[Violation]:
    """A manifest's keys are spelled in `formats/`, and by core's generic reader, alone."""
    for path, text in python_files(root, *CODE):
        if path.startswith("mlpmem_ds/formats/") or path == "mlpmem_ds/core/manifest.py":
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(r"manifest(\[|\.get\()", line):
                yield Violation(path, f"line {number} reads a manifest by key: {line.strip()[:60]}")


def misplaced_configs(root: Path) -> Iterator[Violation]:
    """The flags of a stage are a class in `config.py` of its folder; those of several stages are shared."""
    for path, text in python_files(root, "mlpmem_ds/stages"):
        if Path(path).name not in ("config.py", "options.py", "shared_flags.py"):
            for node in ast.walk(parsed(text)):
                if isinstance(node, ast.ClassDef) and re.search(r"\boption\(", ast.unparse(node)):
                    yield Violation(path, f"class {node.name} with flags belongs in config.py")


def prints(root: Path) -> Iterator[Violation]:
    """The library logs; it never prints."""
    for path, text in python_files(root, "mlpmem_ds"):
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                yield Violation(path, f"line {node.lineno} prints")


def dialect(root: Path) -> Iterator[Violation]:
    """Words that a reader from another country must look up, or that have a common one."""
    for path, text in [*python_files(root, *CODE), *text_files(root, *PROSE, "launch/**/*.sh")]:
        if not re.search(ANY_WORD, text):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            for word, instead in WORDS.items():
                for match in re.finditer(rf"\b{word}\b", line, re.IGNORECASE):
                    yield Violation(path, f"line {number} says {match.group()!r}; say {instead}")


ANY_WORD = re.compile("|".join(rf"\b{word}\b" for word in WORDS), re.IGNORECASE)


def empty_names(root: Path) -> Iterator[Violation]:
    """Variables whose names say nothing of what they hold."""
    for path, text in python_files(root, *CODE):
        for node in ast.walk(parsed(text)):
            is_assigned = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            name = node.id if is_assigned else node.arg if isinstance(node, ast.arg) else ""
            if name in EMPTY_NAMES:
                yield Violation(path, f"line {node.lineno} calls something {name!r}; say the noun")


def incomplete_maps(root: Path) -> Iterator[Violation]:
    """The docstring of a folder's `__init__.py` names each file of the folder, with a line on what it is."""
    for path, text in python_files(root, "mlpmem_ds"):
        folder = root / Path(path).parent
        if path.endswith("/__init__.py") and path.count("/") > 1:
            described = ast.get_docstring(parsed(text)) or ""
            files = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
            folders = sorted(file.parent.name for file in folder.glob("*/__init__.py"))
            for name in [*files, *folders]:
                if not re.search(rf"\b{name}\b", described):
                    yield Violation(path, f"the map of the folder does not name {name}")


def untested_modules(root: Path) -> Iterator[Violation]:
    """Each module has a test of its own name in the mirrored folder, or an entry in TESTED_BY.

    The files of a stage are parts of one command: tests in the stage's folder are enough.
    """
    for path, _ in python_files(root, "mlpmem_ds"):
        name = path.removeprefix("mlpmem_ds/")
        mirrored = root / "tests" / Path(name).with_name(f"test_{Path(name).name}")
        if Path(name).stem.startswith("__") or mirrored.is_file():
            continue
        if name.startswith("stages/") and any(mirrored.parent.glob("test_*.py")):
            continue
        if name not in TESTED_BY:
            yield Violation(path, f"has no test {mirrored.relative_to(root).as_posix()}")
        elif not (root / "tests" / TESTED_BY[name]).is_file():
            yield Violation(path, f"is said to be tested by tests/{TESTED_BY[name]}, which does not exist")


RULES: list[Rule] = [
    long_functions,
    long_files,
    wide_lines,
    wide_prose,
    effects_of_import,
    untyped_manifests,
    misplaced_configs,
    prints,
    dialect,
    empty_names,
    incomplete_maps,
    untested_modules,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    excepted = exceptions(rule)
    assert [f"{path}: {text}" for path, text in rule(ROOT) if path not in excepted] == []


@pytest.mark.parametrize("rule", RULES)
def test_no_exception_is_stale(rule: Rule) -> None:
    """A file that keeps the rule must leave ALLOWED and PENDING."""
    assert exceptions(rule) - {path for path, _ in rule(ROOT)} == set()


def test_exceptions_are_of_rules_and_each_stands_once() -> None:
    assert {*ALLOWED, *PENDING} <= {rule.__name__ for rule in RULES}
    assert not any(set(ALLOWED.get(rule, {})) & files for rule, files in PENDING.items())


def exceptions(rule: Rule) -> set[str]:
    return {*ALLOWED.get(rule.__name__, {}), *PENDING.get(rule.__name__, set())}


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (long_functions, "tests/planted.py", "def f():\n" + "    x = 1\n" * 70),
        (
            long_functions,
            "mlpmem_ds/core/planted.py",
            "class C:\n    def f(self):\n" + "        x = 1\n" * 70,
        ),
        (long_files, "tools/planted.py", "x = 1\n" * 451),
        (wide_lines, "launch/planted.py", "x = '" + "a b " * 30 + "'\n"),
        (wide_lines, "launch/planted.sh", "echo " + "a b " * 30 + "\n"),
        (wide_prose, "docs/planted.md", "A sentence. " * 9),
        (wide_prose, "README.md", "```\n" + "x " * 60 + "\n```\n" + "y " * 60),
        (effects_of_import, "mlpmem_ds/core/planted.py", "import gc\n\ngc.disable()"),
        (effects_of_import, "mlpmem_ds/core/planted.py", "import os\n\nos.environ['A'] = 'b'"),
        (effects_of_import, "mlpmem_ds/core/planted.py", "x = os.environ.setdefault('A', 'b')"),
        (effects_of_import, "mlpmem_ds/core/planted.py", "torch.backends.cuda.matmul.allow_tf32 = True"),
        (effects_of_import, "tools/planted.py", "for x in range(3):\n    pass"),
        (effects_of_import, "tools/planted.py", "TEXT = open('file').read()"),
        (effects_of_import, "tools/planted.py", "if True:\n    import numpy"),
        (untyped_manifests, "mlpmem_ds/stages/planted.py", "x = keys.manifest['codec']"),
        (untyped_manifests, "tools/planted.py", "x = read_manifest(root)\ny = manifest.get('codec')"),
        (misplaced_configs, "mlpmem_ds/stages/a/planted.py", "class Config:\n    x: int = option('help', 3)"),
        (prints, "mlpmem_ds/core/planted.py", "def f():\n    print(3)"),
        (dialect, "mlpmem_ds/core/planted.py", "# the keys at hand"),
        (dialect, "docs/planted.md", "Beside the keys."),
        (dialect, "tools/planted.py", "most_rows = 3"),
        (dialect, "launch/planted.sh", "# whatever it is"),
        (dialect, "mlpmem_ds/core/planted.py", "def f(of_rows): ..."),
        (empty_names, "tools/planted.py", "known, x = 1, 2"),
        (empty_names, "tools/planted.py", "def f(here): ..."),
        (incomplete_maps, "mlpmem_ds/core/__init__.py", '"""What all need: planted_too reads."""'),
        (untested_modules, "mlpmem_ds/core/planted.py", ""),
    ],
)
def test_a_planted_violation_is_found(rule: Rule, path: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, "mlpmem_ds/core/planted_too.py", "")
    plant(tmp_path, "mlpmem_ds/core/unmentioned.py", "")
    plant(tmp_path, "tests/core/test_planted_too.py", "")
    plant(tmp_path, "tests/core/test_unmentioned.py", "")
    assert list(rule(tmp_path)) == []
    plant(tmp_path, path, text)
    assert len(list(rule(tmp_path))) == 1


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (wide_lines, "tools/planted.py", "x = f(1)" + " " * 90 + "  # type: ignore[arg-type]\n"),
        (wide_prose, "README.md", "| " + "cell | " * 20),
        (wide_prose, "README.md", "See [the page](https://a.example/" + "long/" * 30 + ")."),
        (
            effects_of_import,
            "mlpmem_ds/core/planted.py",
            '"""Text."""\n\n_logger = logging.getLogger(__name__)',
        ),
        (
            effects_of_import,
            "tools/planted.py",
            "def main():\n    gc.disable()\n\n\nif __name__ == '__main__':\n    main()",
        ),
        (untyped_manifests, "mlpmem_ds/formats/planted.py", "x = manifest['codec']"),
        (misplaced_configs, "mlpmem_ds/stages/a/config.py", "class Config:\n    x: int = option('help', 3)"),
        (
            dialect,
            "tools/planted.py",
            "at_least = 3  # besides, most of them are softmax_rows or list_of_rows",
        ),
        (empty_names, "tools/planted.py", "f(here=3)"),
    ],
)
def test_what_is_allowed_is_no_violation(rule: Rule, path: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path, path, text)
    assert list(rule(tmp_path)) == []


def plant(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

"""The pages: the commands, flags, links, paths and messages that they name exist; lines end at 100."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "ds_configs/*.md", "mlpmem_ds/formats/*.md")
    for path in ROOT.glob(pattern)
)
FRONT_ENDS = {path.stem: path for folder in ("tools", "launch") for path in (ROOT / folder).glob("*.py")}
MAX_COLUMNS = 100
NAMES_OF_THAT_TIME = {"docs/LAB_ARCHIVE.md"}
# Pages of wide tables: a row of a table cannot be wrapped.
WIDE_TABLES = {
    "mlpmem_ds/formats/README.md",
    "docs/OPERATIONS.md",
    "docs/RESULTS.md",
    "docs/SCALE.md",
    "docs/damage.md",
}
# Flags of other programs that the pages name: launchers, pytest, pip, git.
FOREIGN = {"nproc-per-node", "num-accelerators", "module", "local-rank", "pdb", "local-dir", "no-setup"}
FOREIGN |= {"enforce-eager", "hf-overrides", "trust-remote-code", "continuous-batching"}  # servers
FOREIGN |= {"logits-processors", "compilation-config", "enable-dbo"}
FOREIGN |= {"kv-sharing-fast-prefill", "enable-prompt-embeds"}
FOREIGN |= {"hostfile", "kill-on-bad-exit", "dry-run", "check"}  # srun; pipeline.sh; mlpmem_ds itself
_PATH = re.compile(
    r"(?:mlpmem_ds|tools|launch|tests|docs|ds_configs|core|maths|formats|models|engines|stages)"
    r"/[\w./-]+\.(?:py|sh|md|json|sbatch)"
)
_COMMAND = re.compile(
    r"(?<![\w/])(?:(?:tools|launch)/([a-z_]+)\.(py|sh)\b|mlpmem-([a-z-]+)(?= --)"
    r"|python -m mlpmem_ds ([a-z][a-z_-]*))"
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(text: str) -> Iterator[str]:
    """Lines of fenced and indented blocks, continued ones joined, and the spans of the other lines."""
    blocks = re.findall(r"^ *```(?:bash|)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^    \S.*$", rest, re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\\\n", " ", block).splitlines():
            yield line.partition(" #")[0]
    yield from (re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", rest))


@lru_cache
def help_of(name: str, *words: str) -> str:
    """What a front-end writes for --help; "" where there is none of this name."""
    if name == "demo":
        return (ROOT / "launch/demo.sh").read_text()
    if name not in FRONT_ENDS:
        return ""
    path = FRONT_ENDS[name]
    spec = importlib.util.spec_from_file_location(f"front_end_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        patch.setattr(sys.stdout, "write", written.append)
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit):
            module.main([*words, "--help"])
    return "".join(written)


def flags_of(help_text: str) -> set[str]:
    return {flag.replace("_", "-") for flag in re.findall(r"--([a-z][\w-]*)", help_text)}


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """(front-end, words that follow it) of each command of a page."""
    for line in code_of(text):
        for match in _COMMAND.finditer(line):
            name = next(filter(None, (match[1], match[3], match[4]))).replace("-", "_")
            if match[2] == "sh" and name != "demo":
                continue
            yield name, re.split(r" (?:\||&&|>)|;", line[match.end() :])[0].split()
        name, *words = line.split() or [""]
        if name in FRONT_ENDS and words:
            yield name, words


def faults_of_command(name: str, words: list[str]) -> Iterator[str]:
    sub = words[:1] if name == "bench" and words and words[0].islower() else []
    if name == "bench" and not sub:
        return
    help_text = help_of(name, *sub)
    if not help_text:
        yield f"there is no front-end {name}"
    flags = flags_of(help_text)
    for position, word in enumerate(words):
        if not word.startswith("--"):
            continue
        flag = word[2:].partition("=")[0].replace("_", "-")
        if flag not in flags:
            yield f"{name} has no --{flag}"
        value = words[position + 1] if position + 1 < len(words) else ""
        choices = re.search(rf"--{flag} {{([^}}]*)}}", help_text)
        if choices and re.fullmatch(r"[a-z0-9.,_-]+", value) and value not in choices[1].split(","):
            yield f"{name} --{flag} is not {value}, but one of {choices[1]}"


def faults_of_commands(page: str) -> Iterator[str]:
    if page not in NAMES_OF_THAT_TIME:
        for name, words in commands_of(text_of(page)):
            yield from faults_of_command(name, words)


def faults_of_flags(page: str) -> Iterator[str]:
    """Flags that a page names alone, without a front-end: one of the front-ends has them."""
    if page in NAMES_OF_THAT_TIME:
        return
    known = FOREIGN | {flag for name in (*FRONT_ENDS, "demo") for flag in flags_of(help_of(name))}
    benchmarks = (ROOT / "mlpmem_ds/benchmarks").rglob("*.py")
    known |= {name for path in benchmarks for name in re.findall(r"--([a-z-]+)", path.read_text())}
    for line in code_of(text_of(page)):
        if re.match(r"--[a-z]", line):
            flag = line[2:].split()[0].partition("=")[0].replace("_", "-")
            if flag not in known:
                yield f"no front-end has --{flag}"


def anchors_of(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


def faults_of_links(page: str) -> Iterator[str]:
    text = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not path.exists():
            yield f"{target} does not exist"
        elif anchor and anchor not in anchors_of(path):
            yield f"{target}: no such heading"


def faults_of_paths(page: str) -> Iterator[str]:
    """Files of the repository, as they are called in code; inside the package without its name too."""
    if page not in NAMES_OF_THAT_TIME:
        for line in code_of(text_of(page)):
            for name in _PATH.findall(line):
                places = (ROOT, ROOT / "mlpmem_ds", ROOT / "mlpmem_ds/stages", (ROOT / page).parent)
                if "NAME" not in name and not any((place / name).exists() for place in places):
                    yield f"{name} does not exist"


@lru_cache
def texts_of_source() -> str:
    """Every piece of text in the library's source between the values of its f-strings, one a line."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "mlpmem_ds").rglob("*.py")]
    return "\n".join(
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def faults_of_messages(page: str) -> Iterator[str]:
    """The messages of "What goes wrong": their pieces between dots are pieces of messages in the source."""
    section = text_of(page).partition("## What goes wrong\n")[2].partition("\n## ")[0]
    for item in re.findall(r"^- ((?:.|\n(?!- ))*)", section, re.MULTILINE):
        message = re.sub(r"\s+", " ", re.findall(r"`([^`]*)`", item)[0])
        for piece in re.split(r"\s*…\s*", message):
            if len(piece) > 3 and piece not in texts_of_source():
                yield f"{piece!r} is no piece of a message"


def faults_of_columns(page: str) -> Iterator[str]:
    for number, line in enumerate(text_of(page).splitlines(), 1):
        is_allowed = "](http" in line or (page in WIDE_TABLES and line.startswith("|"))
        if len(line) > MAX_COLUMNS and not is_allowed:
            yield f"line {number} has {len(line)} columns"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    "faults",
    [
        faults_of_commands,
        faults_of_flags,
        faults_of_links,
        faults_of_paths,
        faults_of_messages,
        faults_of_columns,
    ],
)
def test_a_page_names_what_exists(page: str, faults: Callable[[str], Iterator[str]]) -> None:
    assert list(faults(page)) == []


def test_commands_of_all_pages_that_write_one_directory_are_one_command() -> None:
    """The pages go on from one run, and a directory belongs to one set of flags."""
    changes_nothing = {"--audit", "--audit-dims"}
    found: dict[str, dict[tuple[str, ...], str]] = {}
    for page in PAGES:
        for line in code_of(text_of(page)):
            for name, words in commands_of(f"    {line}"):
                flags = [text for text in re.split(r" (?=--)", " ".join(words)) if text.startswith("--")]
                output = next((text[9:] for text in flags if text.startswith("--output ")), "")
                if output.startswith("run/"):
                    deciding = sorted(flag for flag in flags if flag.split()[0] not in changes_nothing)
                    found.setdefault(output, {})[(name, *deciding)] = page
    assert len(found) > 8
    assert {output: pages for output, pages in found.items() if len(pages) > 1} == {}


def test_every_page_is_in_the_list() -> None:
    listed = {
        (ROOT / "docs" / name).resolve() for name in re.findall(r"\]\(([^)#]+)", text_of("docs/README.md"))
    }
    pages = {path.resolve() for path in (ROOT / "docs").glob("*.md")} - {ROOT / "docs/README.md"}
    archive = {ROOT / name for name in NAMES_OF_THAT_TIME}
    assert pages - archive <= listed


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`tools/no_such.py --output X`", "no front-end no_such"),
        ("```bash\npython tools/build_index.py --keys X \\\n    --nonsense 3\n```", "no --nonsense"),
        ("see `extract_keys --codec soft`", "--codec is not soft"),
        ("    bash launch/demo.sh --no-such-option", "demo has no --no-such-option"),
    ],
)
def test_a_planted_mistake_is_found(text: str, fault: str) -> None:
    faults = [found for name, words in commands_of(text) for found in faults_of_command(name, words)]
    assert any(fault in found for found in faults)

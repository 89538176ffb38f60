"""docs/SCALE.md says what plan.py says: its tables, its arithmetic, its rates.

`python tests/test_scale_page.py` writes the tables anew.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmem_ds.core.config import parse_config
from mlpmem_ds.stages.planning import cost_model
from mlpmem_ds.stages.planning.config import Config
from mlpmem_ds.stages.planning.plan import make_plan
from mlpmem_ds.stages.planning.words import bytes_in_words, price_in_words, time_in_words

PAGE = Path(__file__).parents[1] / "docs" / "SCALE.md"
_COMMAND = re.compile(r"```bash\npython tools/plan\.py ((?:.|\n)*?)\n```\n\n((?:\|.*\n)*)")
_LINE = re.compile(r"`([^`=]+) = ([^`]+)`( TB| GPU hours| seconds)?")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "GPU hours": 1, "": 1}
_OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Sub: operator.sub}
_HEAD = ("stage", "on disk", "files", "time", "memory a rank", "on its GPU", "GPU hours", "price", "figures")


def table_of(command: str) -> str:
    """The plan of a command line, as the page shows it."""
    plan = make_plan(parse_config(Config, shlex.split(command.replace("\\\n", " ")), prog="plan"))
    told = plan.to_json()
    rows = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 2), "---")]
    none = {"rank_memory_bytes": 0, "rank_gpu_bytes": 0, "limit": None}
    whole = {"name": "all", "num_files": told["files"], **none, **told}
    for stage in (*told["stages"], whole):
        rows.append(
            (
                stage["name"],
                bytes_in_words(stage["bytes"]),
                f"{stage['num_files']:,}",
                "–" if stage["seconds"] is None else time_in_words(stage["seconds"]),
                *(
                    bytes_in_words(stage[name]) if stage[name] else ""
                    for name in ("rank_memory_bytes", "rank_gpu_bytes")
                ),
                "–" if stage["gpu_hours"] is None else hours_in_words(stage["gpu_hours"]),
                "–" if stage["price"] is None else price_in_words(stage["price"]),
                "" if stage is whole else "assumed rates" if stage["gpu_hours"] else "estimate",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def hours_in_words(hours: float) -> str:
    return f"{hours:.4g}" if hours < 1000 else f"{hours:,.0f}"


def with_tables(text: str) -> str:
    """The page with the tables of today."""
    return _COMMAND.sub(
        lambda found: f"```bash\npython tools/plan.py {found[1]}\n```\n\n{table_of(found[1])}", text
    )


def computed(formula: str) -> float:
    """The value of a line's left side: numbers, + − × / and parentheses."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int | float), formula
        return float(node.value)

    plain = re.sub(r"\s+", " ", formula.replace("×", "*").replace("−", "-").replace(",", ""))
    return value(ast.parse(plain, mode="eval").body)


def lines_of_arithmetic() -> Iterator[tuple[str, str, str]]:
    """(formula, result, text of the section) of each line."""
    for section in re.split(r"(?m)^## ", PAGE.read_text(encoding="utf-8")):
        for formula, result, _ in _LINE.findall(section):
            yield formula, result, section


def test_the_tables_are_those_of_plan() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(_COMMAND.findall(text)) == 4
    assert text == with_tables(text), "plan.py says something else now: python tests/test_scale_page.py"


@pytest.mark.parametrize(("formula", "result", "section"), lines_of_arithmetic())
def test_the_arithmetic_is_right_and_in_the_table(formula: str, result: str, section: str) -> None:
    number, _, unit = result.partition(" ")
    shown = float(number.replace(",", ""))
    digits = len(re.sub(r"e.*|\D", "", number).lstrip("0"))
    exact = computed(formula) / _UNITS[unit]
    half = 0.5 * 10 ** (math.floor(math.log10(shown)) - digits + 1)
    assert abs(exact - shown) <= half * 1.01, f"{formula} is {exact}"
    if unit:
        cells = {cell.strip() for cell in section.split("|")}
        assert (number if unit == "GPU hours" else result) in cells


def test_the_rates_are_those_of_plan() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Which rates are measured")[2]
    for rate in (
        cost_model._CORE_FORWARD,
        cost_model._CORE_TRAINING,
        cost_model._CORE_INT8,
        cost_model._CORE_HASHED,
        cost_model._SECONDS_OF_ENCODING,
        cost_model._SECONDS_OF_NEIGHBOUR,
        cost_model._GPU_SECONDS_OF_PAIR,
        cost_model._NVLINK_RATE,
    ):
        assert f"| {rate:g} " in section, rate
    assert f"| {cost_model._CORE_TOKENS:,.0f} " in section
    for share in (cost_model._GPU_FORWARD, cost_model._GPU_TRAINING, cost_model._GPU_SEARCH):
        assert f"| {share:g} of its peak |".replace(" 0.", " .") in section


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

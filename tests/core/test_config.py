from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from mlpmem_ds.core.config import (
    Flags,
    deciding_values,
    default_of,
    default_values,
    option,
    parse_config,
    plain_values,
    refuse_shared_host,
)
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Make something.

    In detail.
    """

    example: ClassVar[str] = "tool --input a"

    input: tuple[str, ...] = option("files", identity="none")
    output: Path = option("directory")
    block_size: int = option("tokens", 1024)
    rate: float | None = option("a rate in 100 % of cases", None)
    codec: Literal["int8", "raw"] = option("codec", "int8")
    keep: bool = option("keep it", True)
    threads: int = option("threads", 1, identity="none")
    also: Path | None = option("a path that may be left out", None)
    size: str | None = option("a named size", None, choices=("small", "large"))


def parse(*words: str) -> Config:
    return parse_config(Config, words, prog="tool")


@dataclass(frozen=True, kw_only=True)
class Named(Config):
    @classmethod
    def dependent_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"rate": 0.25, "codec": "raw"} if values["size"] == "large" else {}


def test_what_is_given_is_named_as_users_write_it() -> None:
    config = parse("--input", "a", "--output", "o", "--no-keep", "--block-size", "5")
    assert config.given("keep", "block_size", "rate") == ["--no-keep", "--block-size"]
    with pytest.raises(UserError, match="--no-keep is of --also: add that, or leave it out"):
        config.refuse_unused("keep", of="--also")


def test_a_flag_may_change_the_defaults_of_others_and_what_is_given_wins() -> None:
    def parse_named(*words: str) -> Named:
        return parse_config(Named, ["--input", "a", "--output", "out", *words], prog="tool")

    assert parse_named("--size", "large").rate == 0.25 and parse_named("--size", "small").rate is None
    config = parse_named("--rate", "none", "--codec", "int8", "--size", "large")
    assert config.rate is None and config.codec == "int8"  # the ordinary defaults, and given


def test_what_nothing_reads_is_refused_unless_it_is_the_default() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Audited(Named):
        def check(self) -> None:
            if self.also is None:
                self.refuse_unused("block_size", "rate", of="--also")

    for words in ([], ["--block-size", "1024"], ["--also", "x", "--block-size", "9"]):
        parse_config(Audited, ["--input", "a", "--output", "out", *words], prog="tool")
    for words, said in (
        (["--block-size", "9"], "--block-size is of --also: add that, or leave it out"),
        (
            ["--rate", "1", "--block-size", "9"],
            "--block-size, --rate are of --also: add that, or leave them out",
        ),
    ):
        with pytest.raises(UserError, match=said):
            parse_config(Audited, ["--input", "a", "--output", "out", *words], prog="tool")


def test_flags_become_typed_fields() -> None:
    config = parse(
        "--input",
        "a",
        "b",
        "--output",
        "out",
        "--block_size",
        "8",
        "--rate",
        ".5",
        "--no-keep",
        "--codec=raw",
    )
    assert config == Config(
        input=("a", "b"), output=Path("out"), block_size=8, rate=0.5, codec="raw", keep=False
    )


def test_underscores_and_hyphens_are_the_same_flag() -> None:
    assert parse("--input", "a", "--output", "o", "--block-size=3") == parse(
        "--input", "a", "--output", "o", "--block_size=3"
    )


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--input", "a", "--output", "o", "--codec", "x"),
        ("--input", "a", "--output", "o", "--block", "3"),
    ],
)
def test_wrong_flags_exit_with_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_shows_defaults_the_docstring_and_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for part in (
        "(default: 1024)",
        "example:\n  tool --input a",
        "\n\nMake something.\n\nIn detail.\n",
        "100 % of cases",
    ):
        assert part in text


def test_only_what_differs_from_its_default_decides_and_no_path_or_resource() -> None:
    config = Config(input=("a",), output=Path("o"), threads=4)
    assert deciding_values(config, {}) == {}
    other = Config(
        input=("b",), output=Path("p"), also=Path("q"), block_size=8, rate=0.5, codec="raw", keep=False
    )
    assert deciding_values(other, {}) == {"block_size": 8, "rate": 0.5, "codec": "raw", "keep": False}
    assert deciding_values(other, {}, flags=("rate", "size")) == {"rate": 0.5}
    assert plain_values(config)["output"] == "o"
    assert default_of(Config, "block_size") == default_values(Config)["block_size"] == 1024
    assert "output" not in default_values(Config)


def test_numbers_that_are_none_are_refused() -> None:
    for word in ("nan", "inf"):
        with pytest.raises(UserError, match=f"--rate must be a finite number, not {word}"):
            parse("--input", "a", "--output", "o", "--rate", word)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", ""], "argument --output: '' is empty: is a variable unset?"),
        (["--output", " \t"], "is empty: is a variable unset?"),
        (["--output="], "argument --output: '' is empty"),
        (["--input", "a", ""], "argument --input: '' is empty"),
        (["--also", ""], "argument --also: '' is empty"),
        (["--size", ""], "argument --size: '' is empty"),
        (["--output", "out\r"], "line ends of Windows"),
        (["--output", "out\n"], "line ends of Windows"),
        (["--output", "a\0b"], "NUL"),
        (["--output"], "expected one argument"),
        (["--output", "/dev/zero"], "named pipe or a device"),
        (["--input", "a", "--input", "b"], "given twice: give all its values after one --input"),
        (["--block_size", "9", "--block-size", ""], "no whole number"),
        (["--block-size", "1,000"], "no whole number"),
        (["--block-size", "99999999999999999999"], "too large"),
        (["--block-size", "9" * 5000], "no whole number"),
        (["--rate", "1,5"], "invalid float value"),
        (["--ouput", "x"], "did you mean --output?"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = [word for flag in ("--input", "--output") for word in (flag, "x") if flag not in str(words)]
    with pytest.raises(SystemExit) as caught:
        parse(*needed, *words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_of_a_flag_that_is_given_twice_the_last_counts() -> None:
    twice = parse("--input", "a", "--output", "a", "--block-size", "1", "--output", "b", "--block_size", "2")
    assert (twice.output, twice.block_size) == (Path("b"), 2)


def test_words_that_the_type_does_not_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--input", "a", "--output", "o", "--size", "large").size == "large"
    with pytest.raises(SystemExit) as caught:
        parse("--input", "a", "--output", "o", "--size", "huge")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "'huge'" in said and "small" in said and "large" in said


def test_a_positional_word_is_also_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Look(Flags):
        """Look at a directory, at length, at a length that does not fit in one line of the help, which has
        no more than 118 columns."""

        run: Path = option("directory", metavar="RUN", positional=True)
        threads: int = option("threads", 1)

    def look(*words: str) -> Look:
        return parse_config(Look, words, prog="look.py")

    for words in (
        ["r", "--threads", "2"],
        ["--threads", "2", "r"],
        ["--run", "r", "--threads", "2"],
        ["--run=r"],
    ):
        assert look(*words).run == Path("r")
    with pytest.raises(SystemExit):
        look()
    assert "required: RUN" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        look("--help")
    text = capsys.readouterr().out
    assert "usage: look.py [-h] [--threads INT] RUN" in text and max(map(len, text.splitlines())) <= 118


@dataclass(frozen=True, kw_only=True)
class Bounded(Flags):
    k: int = option("neighbours", 4, at_least=1, at_most=65535)
    steps: int | None = option("steps", None, at_least=2)
    share: float = option("a share", 0.5, above=0, below=1)
    sizes: tuple[int, ...] = option("sizes", (1, 2), at_least=1)
    lmbda: float = option("weight", 0.25, at_most=1, flag="lambda")

    def check(self) -> None:
        if self.steps is not None and self.steps > self.k:
            raise UserError(f"--steps {self.steps} must not pass --k {self.k}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": 0}, "--k must be at least 1 and at most 65535, not 0"),
        ({"k": 65536}, "--k must be at least 1 and at most 65535, not 65536"),
        ({"steps": 1}, "--steps must be at least 2, not 1"),
        ({"share": 0.0}, "--share must be above 0 and below 1, not 0.0"),
        ({"share": float("nan")}, "--share must be a finite number, not nan"),
        ({"sizes": (3, 0)}, "--sizes must be at least 1, not 0"),
        ({"lmbda": 1.5}, "--lambda must be at most 1, not 1.5"),
        ({"steps": 5}, "--steps 5 must not pass --k 4"),
    ],
)
def test_a_number_out_of_its_fields_bounds_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Bounded(**flags)
    assert str(caught.value) == message


def test_numbers_on_their_bounds_and_what_is_left_out_are_taken() -> None:
    assert Bounded(k=65535, steps=2, sizes=(), lmbda=1.0).steps == 2
    assert Bounded().steps is None


def test_a_config_cannot_forget_the_bounds() -> None:
    with pytest.raises(AssertionError, match=r"write check\(self\)"):

        class Forgetful(Flags):
            def __post_init__(self) -> None: ...


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("--ouput", "there is no flag --ouput; did you mean --output?"),
        ("--block_sise=3", "there is no flag --block-sise; did you mean --block-size?"),
        ("--xyzzy", "there is no flag --xyzzy\n"),
    ],
)
def test_a_misspelt_flag_is_named_with_the_one_most_like_it(
    word: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--input", "a", word, "o")  # and --output is missing
    assert caught.value.code == 2 and answer in capsys.readouterr().err


def test_a_text_that_begins_with_hyphens_is_no_flag() -> None:
    assert parse("--input", "--not a flag", "--output=--o").output == Path("--o")


def test_a_number_that_may_be_absent_is_written_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--input", "a", "--output", "o", "--rate", "none").rate is None
    with pytest.raises(SystemExit):
        parse("--input", "a", "--output", "o", "--block-size", "none")
    with pytest.raises(SystemExit):
        parse("--input", "a", "--output", "o", "--rate", "fast")
    assert "invalid float value: 'fast'" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Derived(Config):
    block_size: int = option("another default", 512)
    depth: int = option("a flag of its own", 3)


def test_help_shows_inherited_optional_flags_last(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(Derived, ["--help"], prog="tool")
    shown = capsys.readouterr().out
    places = [shown.index(f"\n  --{flag}") for flag in ("input", "output", "block-size", "depth", "rate")]
    assert places == sorted(places)


def test_a_flag_for_a_rank_alone_on_its_host_is_refused_where_others_are() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Spread(Flags):
        spread: str = option("where", "none", one_rank_a_host="takes all of the host")
        number: int = option("a number", 1)

    shared, alone = World(size=2, local_size=2), World(size=2, local_size=1)
    for config, world in ((Spread(), shared), (Spread(number=2), shared), (Spread(spread="all"), alone)):
        refuse_shared_host(config, world)
    with pytest.raises(UserError, match="--spread all takes all of the host, and .*: start one on each host"):
        refuse_shared_host(Spread(spread="all"), shared)

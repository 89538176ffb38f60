"""Recipes: flags by name, which a flag that is given overrules, and the record of it."""

from pathlib import Path

import pytest

from mlpmem_ds.core.config import parse_config
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.recipes import RECIPES, recipe_changes

WORDS = ("--ds_config", "x", "--corpus", "x", "--targets", "x", "--output", "x")


def parse(*words):
    return parse_config(Config, [*WORDS, *words], prog="train")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_its_flags_and_leaves_the_others(name):
    plain, config = parse(), parse("--recipe", name)
    flags = RECIPES[name].flags
    assert {flag: getattr(config, flag) for flag in flags} == flags and recipe_changes(config) == {}
    others = [field for field in plain.__dataclass_fields__ if field not in (*flags, "recipe")]
    assert all(getattr(config, field) == getattr(plain, field) for field in others)
    assert any(getattr(plain, flag) != value for flag, value in flags.items())


def test_a_given_flag_keeps_its_value_even_where_it_is_the_ordinary_default():
    config = parse("--recipe", "paper", "--alpha", "0.5", "--epochs", "2", "--seed", "7")
    assert (config.alpha, config.epochs, config.learning_rate) == (0.5, 2.0, 4e-4)
    assert recipe_changes(config) == {"alpha": 0.5, "epochs": 2.0}


def test_without_a_recipe_nothing_was_changed():
    assert recipe_changes(parse("--alpha", "0.1")) == {}


def test_a_config_made_without_a_command_line_says_what_it_did_not_follow():
    config = Config(
        ds_config=Path("x"), corpus=Path("x"), targets=Path("x"), output=Path("x"), recipe="paper"
    )
    assert recipe_changes(config)["alpha"] == 0.5


def test_a_recipe_and_a_choice_contradict_each_other():
    with pytest.raises(UserError, match="--recipe paper says what is minimized"):
        parse("--recipe", "paper", "--objective", "auto")

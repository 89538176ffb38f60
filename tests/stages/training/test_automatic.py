"""`--objective auto`: the rule is a table, each row of which some facts reach; what is given is kept."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlpmem_ds.core.config import parse_config
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.training.automatic import RULES, Facts, choose, settle
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.inputs import TrainingInputs
from mlpmem_ds.stages.training.objectives import OBJECTIVES

MANY = Facts(num_positions=10**7, has_targets=True, starts_as_base=False, has_log_probabilities=True)
WORDS = ("--ds_config", "x", "--corpus", "x", "--targets", "x", "--output", "x")


def parse(*words):
    return parse_config(Config, [*WORDS, *words], prog="train")


def make_inputs(*, num_positions=1000, targets=True):
    keys = SimpleNamespace(num_positions=num_positions, has_log_probabilities=True)
    return TrainingInputs(
        corpus=None,
        keys=keys,
        targets=SimpleNamespace() if targets else None,
        model_sha256=None,
        tuning=None,
        initial=None,
    )


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (replace(MANY, has_targets=False), ("imitation", 0.0, "plain")),
        (replace(MANY, starts_as_base=True), ("imitation", 0.5, "plain")),
        (replace(MANY, num_positions=100_000), ("imitation", 0.5, "mixture")),
        (replace(MANY, num_positions=100_000, has_log_probabilities=False), ("imitation", 0.5, "plain")),
        (MANY, ("imitation", 0.5, "plain")),
    ],
)
def test_facts_decide(facts, expected):
    choice = choose(facts)
    assert (choice.objective, choice.alpha, choice.ce_through) == expected
    assert choice.reason and not choice.reason.endswith(".")


def test_every_rule_is_reached_and_names_an_objective():
    cases = [
        replace(MANY, has_targets=has, starts_as_base=starts, num_positions=count, has_log_probabilities=logs)
        for has in (False, True)
        for starts in (False, True)
        for count in (10**5, 10**7)
        for logs in (False, True)
    ]
    assert {id(choose(facts)) for facts in cases} == {id(rule.choice) for rule in RULES}
    assert all(rule.choice.objective in OBJECTIVES for rule in RULES)


def test_what_is_chosen_is_logged_with_its_reason(caplog):
    with caplog.at_level(logging.INFO):
        config, inputs = settle(parse("--objective", "auto"), make_inputs(), World())
    assert (config.objective, config.alpha, config.ce_through) == ("imitation", 0.5, "mixture")
    assert "chose --objective imitation --alpha 0.5 --ce-through mixture: below 500,000" in caplog.text
    assert inputs.objective_reason in caplog.text and "passes" not in caplog.text


def test_flags_that_are_given_are_kept_and_few_epochs_named(caplog):
    config, _ = settle(
        parse("--objective", "auto", "--alpha", "0.5", "--ce-through", "plain", "--epochs", "1"),
        make_inputs(),
        World(),
    )
    assert (config.alpha, config.ce_through) == (0.5, "plain") and "--epochs 1" in caplog.text


def test_without_auto_nothing_is_chosen():
    config, inputs = parse("--alpha", "0.3"), make_inputs()
    assert settle(config, inputs, World()) == (config, inputs)


def test_without_targets_it_is_cross_entropy():
    words = ["--keys" if word == "--targets" else word for word in WORDS]
    config = parse_config(Config, [*words, "--objective", "auto"], prog="train")
    assert settle(config, make_inputs(targets=False), World())[0].alpha == 0


def test_the_weight_of_a_mixture_that_is_not_chosen_is_left_out_with_a_warning(caplog):
    words, many = ("--objective", "auto", "--mixture-lambda", "0.5"), make_inputs(num_positions=10**7)
    assert settle(parse(*words), make_inputs(), World())[0].mixture_lambda == 0.5
    plain = settle(parse(*words), many, World())[0]
    assert plain == settle(parse("--objective", "auto"), many, World())[0]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("--mixture-lambda is not used: it is of --ce-through mixture")


def test_the_weight_of_a_mixture_is_refused_next_to_plain_cross_entropy():
    with pytest.raises(UserError, match="--mixture-lambda is of --ce-through mixture"):
        parse("--objective", "auto", "--mixture-lambda", "0.5", "--ce-through", "plain")


def test_no_alpha_is_of_auto_alone():
    with pytest.raises(UserError, match="--alpha None.*--objective auto"):
        parse("--alpha", "none")


def test_another_rank_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        settle(parse("--objective", "auto"), make_inputs(), World(rank=1, size=2))
    assert not caplog.records

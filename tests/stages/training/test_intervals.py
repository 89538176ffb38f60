"""How often to save: the interval at which saving and repeating cost least together."""

from mlpmem_ds.stages.training.intervals import best_interval, interval_advice


def cost(interval_seconds: float, checkpoint: float, failures: float) -> float:
    """Share of the time that goes into saving, and into what is done twice."""
    return checkpoint / interval_seconds + interval_seconds / 2 / failures


def test_no_other_number_of_steps_costs_less() -> None:
    checkpoint, step, failures = 2.0, 0.25, 3600.0
    best = best_interval(checkpoint, step, failures)
    assert best == 480
    costs = {steps: cost(steps * step, checkpoint, failures) for steps in range(100, 2000, 10)}
    assert min(costs, key=lambda steps: costs[steps]) == best


def test_a_step_is_the_least() -> None:
    assert best_interval(0.001, 100.0, 60.0) == 1


def test_the_line_for_the_log() -> None:
    assert interval_advice(2.0, 0.25) == (
        "a checkpoint took 2 s, a step 0.25 s: least time is lost with --save-every-steps 480 at a failure an"
        " hour, 2352 at one a day"
    )

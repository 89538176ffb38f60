"""The validation of a base."""

import contextlib
import math
from types import SimpleNamespace

import pytest

from mlpmem_ds.core.world import World
from mlpmem_ds.stages.base.objective import NextTokenModule
from mlpmem_ds.stages.base.validation import BaseValidator


@pytest.mark.parametrize(
    ("nats", "perplexity"), [(0.5, math.exp(0.5)), (800.0, math.inf), (math.inf, math.inf)]
)
def test_a_base_that_diverges_has_an_infinite_perplexity(monkeypatch, nats, perplexity):
    """From 710 nats on exp is beyond float64."""
    monkeypatch.setattr(BaseValidator, "_scores", lambda *_: iter([-10 * nats, -20 * nats]))
    tuning = SimpleNamespace(windows=lambda: [], num_counted=30)
    module = NextTokenModule.__new__(NextTokenModule)
    engine = SimpleNamespace(module=module, device="cpu", evaluating=contextlib.nullcontext)
    validation = BaseValidator(tuning, World()).run(engine, 3)
    assert validation.perplexity == pytest.approx(perplexity) and validation.step == 3

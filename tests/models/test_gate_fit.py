"""The fit of a gate: gradient and best fixed weights against fp64, and texts whose right gate is known."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from mlpmem_ds.models.gate_features import History
from mlpmem_ds.models.gate_fit import FitSettings, GateRows, best_weights, fit_gate
from mlpmem_ds.models.gates import ConfidencesGate, HistoryGate

SETTINGS = FitSettings(learning_rate=3e-3, max_epochs=60, patience=10, batch_positions=512, seed=0)


def uniform_rows(features_NF: torch.Tensor, *logs: torch.Tensor) -> GateRows:
    return GateRows(
        features_NF=features_NF,
        log_base_N=logs[0].double(),
        log_memories_NM=torch.stack(logs[1:], -1).double(),
        shares_N=torch.full((len(logs[0]),), 1 / len(logs[0]), dtype=torch.float64),
    )


def random_rows(num_memories: int, count: int = 400, seed: int = 0) -> GateRows:
    generator = torch.Generator().manual_seed(seed)
    logs = -4 * torch.rand(1 + num_memories, count, generator=generator, dtype=torch.float64)
    features = torch.randn(count, 2 + 4 * num_memories, generator=generator)
    return uniform_rows(features, *logs)


@pytest.mark.parametrize("num_memories", [1, 3])
def test_best_weights_are_those_of_a_search(num_memories: int) -> None:
    rows = random_rows(num_memories)
    rows = dataclasses.replace(rows, log_base_N=rows.log_base_N + 0.3)
    found = best_weights(rows)
    best = float(rows.loss(torch.tensor(found, dtype=torch.float64)))
    if num_memories == 1:
        grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
        losses = torch.stack([rows.loss(weight[None]) for weight in grid])
        assert abs(found[0] - float(grid[losses.argmin()])) < 1e-3
    generator = torch.Generator().manual_seed(1)
    for other in torch.rand(300, 1 + num_memories, generator=generator, dtype=torch.float64):
        weights = (other / other.sum())[1:]
        assert best <= float(rows.loss(weights)) + 1e-9
    useless = dataclasses.replace(rows, log_memories_NM=rows.log_memories_NM - 50)
    assert max(best_weights(useless)) < 1e-3 and min(best_weights(useless)) >= 0


def test_rounded_weights_are_no_more_than_all_there_is() -> None:
    """Each token is said by one memory alone: the best weights are the shares of the tokens."""
    for shares in ((0.3333337, 0.3333337, 0.3333326), (0.1428577, 0.1428577, 0.7142846), (0.2, 0.7, 0.1)):
        logs_NK = torch.full((3, 4), -60.0, dtype=torch.float64)
        logs_NK[:, 1:].fill_diagonal_(0.0)
        rows = uniform_rows(torch.empty(3, 0), *logs_NK.unbind(1))
        found = best_weights(dataclasses.replace(rows, shares_N=torch.tensor(shares, dtype=torch.float64)))
        assert found == pytest.approx(shares, abs=1.1e-6)
        assert found == tuple(round(weight, 6) for weight in found)
        assert sum(round(1e6 * weight) for weight in found) == 1_000_000


def test_the_loss_and_its_gradient_are_those_of_the_definition() -> None:
    rows = random_rows(2)
    gate = ConfidencesGate(lmbdas=(0.2, 0.5)).double()
    torch.nn.init.normal_(gate.out.weight)
    features = rows.features_NF.double().requires_grad_()
    rows.loss(gate.weights(features)).backward()
    found = [parameter.grad.clone() for parameter in gate.parameters() if parameter.grad is not None]
    gate.zero_grad()
    hidden = torch.nn.functional.gelu(rows.features_NF.double() @ gate.layer.weight.t() + gate.layer.bias)
    scores = hidden @ gate.out.weight.t() + gate.out.bias
    weights = torch.cat([torch.zeros(len(scores), 1), scores], -1).softmax(-1)
    p = torch.cat([rows.log_base_N[:, None], rows.log_memories_NM], -1).exp()
    (-(rows.shares_N * (weights * p).sum(-1).log()).sum()).backward()
    assert len(found) == 4
    for gradient, parameter in zip(found, gate.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


@dataclass(frozen=True)
class Text:
    """Documents of one kind: in each, one of base and memory is the better by far."""

    rows: GateRows
    right_N: torch.Tensor
    """the λ that minimizes the expected loss of each document's kind"""


def made_up_text(kinds: tuple[float, ...], seed: int, documents: int = 60, length: int = 50) -> Text:
    """Each document is of one of `kinds`: the mean advantage in nats that the memory has there; only the
    history tells which."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(kinds), (documents,), generator=generator)
    advantage_N = torch.tensor(kinds)[picked].repeat_interleave(length)
    count = documents * length
    log_base = -3 + 0.5 * torch.randn(count, generator=generator)
    log_memory = log_base + advantage_N + 0.3 * torch.randn(count, generator=generator)
    segments = torch.arange(documents).repeat_interleave(length)
    history, _ = History().along(log_base, log_memory[:, None], segments=segments)
    noise = torch.randn(count, 6, generator=generator)  # confidences that say nothing
    rows = uniform_rows(torch.cat([noise, history], -1), log_base, log_memory)
    return Text(rows, (advantage_N > 0).double())


def test_a_gate_finds_by_the_history_which_model_is_right() -> None:
    fitted, stopping, test = (made_up_text((2.0, -2.0), seed).rows for seed in (1, 2, 3))
    gate = HistoryGate(lmbdas=(0.5,))
    fit = fit_gate(gate, fitted, stopping, SETTINGS)
    fixed = float(test.loss(torch.tensor(best_weights(fitted), dtype=torch.float64)))
    assert fit.stopping_losses[0] == pytest.approx(
        float(stopping.loss(torch.tensor(best_weights(fitted), dtype=torch.float64))), abs=1e-6
    )
    with torch.no_grad():
        gated = float(test.loss(gate.weights(test.features_NF)))
        weights_N = gate.weights(test.features_NF)[:, 0]
    right_N = made_up_text((2.0, -2.0), 3).right_N
    oracle = float(test.loss(right_N[:, None]))
    # All but the few tokens at a document's start, where nothing is known yet.
    assert oracle < gated < oracle + 0.1 and gated < fixed - 0.4
    is_late_N = torch.arange(len(right_N)) % 50 >= 10
    assert float(((weights_N > 0.5).double() == right_N)[is_late_N].double().mean()) > 0.98
    assert fit.best_epoch > 0 and fit.stopping_losses[fit.best_epoch] == min(fit.stopping_losses)
    assert fit.epochs == len(fit.stopping_losses) - 1 == len(fit.fitted_losses) - 1

    without = ConfidencesGate(lmbdas=(0.5,))
    rows = [dataclasses.replace(text, features_NF=text.features_NF[:, :6]) for text in (fitted, stopping)]
    fit = fit_gate(without, *rows, SETTINGS)
    assert min(fit.stopping_losses) > fixed - 0.05  # nothing to read, nothing to gain


def test_fitting_on_both_domains_does_the_old_one_no_harm() -> None:
    new, old = (2.0, 1.5), (-1.5,)
    both = [GateRows.joined([made_up_text(kind, seed).rows for kind in (new, old)]) for seed in (1, 2)]
    alone = [made_up_text(new, seed).rows for seed in (1, 2)]
    test_new, test_old = made_up_text(new, 3).rows, made_up_text(old, 4).rows
    losses = {}
    for name, rows in (("both", both), ("alone", alone)):
        gate = HistoryGate(lmbdas=(0.5,))
        fit_gate(gate, *rows, SETTINGS)
        with torch.no_grad():
            losses[name] = [float(text.loss(gate.weights(text.features_NF))) for text in (test_new, test_old)]
    base_new, base_old = (float(-text.log_base_N.mean()) for text in (test_new, test_old))
    assert losses["both"][1] < base_old + 0.06 < losses["alone"][1]
    assert base_new - losses["both"][0] > 0.9 * (base_new - losses["alone"][0])


def test_every_text_counts_the_same() -> None:
    small, large = random_rows(1, 30, seed=1), random_rows(1, 3000, seed=2)
    joined = GateRows.joined([small, large])
    assert float(joined.shares_N.sum()) == pytest.approx(1)
    assert float(joined.shares_N[:30].sum()) == pytest.approx(0.5)
    lmbdas = torch.tensor([0.3], dtype=torch.float64)
    wanted = (small.loss(lmbdas) + large.loss(lmbdas)) / 2
    torch.testing.assert_close(joined.loss(lmbdas), wanted)


def test_a_fit_is_the_same_again_and_stops_at_the_best() -> None:
    fitted, stopping = made_up_text((2.0, -2.0), 1).rows, random_rows(1, 300, seed=8)
    stopping = dataclasses.replace(
        stopping, features_NF=torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    )
    gates = [HistoryGate(lmbdas=(0.5,)) for _ in range(2)]
    settings = dataclasses.replace(SETTINGS, patience=3)
    fits = [fit_gate(gate, fitted, stopping, settings) for gate in gates]
    assert fits[0] == fits[1]
    states = [gate.state_dict() for gate in gates]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert fits[0].epochs == min(fits[0].best_epoch + 3, settings.max_epochs)
    with torch.no_grad():
        now = float(stopping.loss(gates[0].weights(stopping.features_NF)))
    assert math.isclose(now, min(fits[0].stopping_losses), rel_tol=1e-12)

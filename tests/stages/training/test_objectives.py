"""The objectives of a memory: the loss of a batch against a dense formula, and their list."""

import typing

import pytest
import torch

from mlpmem_ds.formats.batches import BatchReader
from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.formats.targets import open_targets
from mlpmem_ds.formats.training_order import TrainingOrder
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.imitation import Imitation
from mlpmem_ds.stages.training.objectives import OBJECTIVES


def test_the_flag_has_the_names_of_the_list():
    assert typing.get_args(typing.get_type_hints(Config)["objective"]) == ("auto", *OBJECTIVES)


def test_a_batch_brings_what_the_objective_needs(inputs_dir):
    flags = {name: inputs_dir / name for name in ("corpus", "targets", "keys")}
    shape = MemoryConfig(input_size=4, hidden_size=4, intermediate_size=8, num_blocks=1, vocab_size=9)

    def needs(**changes):
        config = Config(**flags, ds_config=inputs_dir, output=inputs_dir / "memory", **changes)
        objective = OBJECTIVES[config.objective](config, shape)
        return objective.needs_targets, objective.needs_base_log_probabilities

    assert needs() == (True, False)
    assert needs(alpha=0.0) == (False, False)
    assert needs(ce_through="mixture") == (True, True)
    assert needs(objective="helpful") == (True, True)
    assert needs(objective="joined", model="x") == (True, False)


@pytest.mark.parametrize("mixture_lambda", [None, 0.25])
@pytest.mark.parametrize("only_helpful", [False, True])
def test_imitation_is_the_dense_loss(inputs_dir, mixture_lambda, only_helpful):
    alpha, keys = 0.3, open_keys(inputs_dir / "keys")
    shape = MemoryConfig(
        input_size=keys.input_size,
        hidden_size=8,
        intermediate_size=16,
        num_blocks=1,
        vocab_size=keys.manifest.head_size,
        initializer_range=0.3,
    )
    objective = Imitation(memory=shape, alpha=alpha, mixture_lambda=mixture_lambda, only_helpful=only_helpful)
    reader = BatchReader(
        keys,
        open_targets(inputs_dir / "targets"),
        TrainingOrder(
            num_positions=keys.num_positions, block_size=keys.manifest.block_size, window_blocks=2, seed=0
        ),
        batch_positions=40,
        rank=0,
        size=1,
        num_micro_batches=1,
        with_log_probabilities=objective.needs_base_log_probabilities,
    )
    (batch,) = reader.read(0)
    torch.manual_seed(0)
    module = objective.make_module()
    arguments = objective.arguments(batch, torch.device("cpu"), torch.float32)
    for row, first in enumerate(arguments[1].offsets_N1[:-1:2].tolist()):  # labels that the teacher knows
        arguments[1].labels_N[2 * row] = arguments[1].ids[first]
    loss, sums = module(*arguments)
    assert len(sums) == len(objective.sums)

    inputs_NI, targets = arguments
    own_NV = module.head.weight.double().detach()
    states_NH = super(type(module), module).forward(inputs_NI).double().detach()
    log_p_NV = (states_NH @ own_NV.T).log_softmax(-1)
    ce_N = -log_p_NV.gather(1, targets.labels_N[:, None])[:, 0]
    taught = 0
    if mixture_lambda is not None:
        base_N = targets.base_log_probabilities_N.double().exp()
        ce_N = -((1 - mixture_lambda) * base_N + mixture_lambda * (-ce_N).exp()).log()
    total = 0.0
    for row, (start, stop) in enumerate(zip(targets.offsets_N1[:-1], targets.offsets_N1[1:], strict=True)):
        weights = targets.probabilities[start:stop].double()
        of_label = weights[targets.ids[start:stop] == targets.labels_N[row]].sum()
        is_taught = len(weights) > 0
        if only_helpful:
            is_taught &= bool(of_label > targets.base_log_probabilities_N[row].double().exp())
        taught += is_taught
        if not is_taught:  # a row that nobody teaches is cross entropy alone
            total += ce_N[row]
            continue
        weights = weights / weights.sum()
        kl = (weights * (weights.log() - log_p_NV[row, targets.ids[start:stop]])).sum()
        total += alpha * kl + (1 - alpha) * ce_N[row]
    assert loss.item() == pytest.approx(float(total) / len(inputs_NI), rel=1e-5)
    if only_helpful:
        assert 0 < sums[objective.sums.index("taught")] == taught < len(inputs_NI)

"""The training objective: its loss is the sparse loss of a plain memory, and its weights are a plain
memory's."""

import contextlib
import dataclasses

import pytest
import torch

from mlpmem_ds.maths.sparse_loss import TargetBatch
from mlpmem_ds.models.memory import Memory
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.objective import MemoryWithLoss

CONFIG = MemoryConfig(input_size=7, hidden_size=10, intermediate_size=23, num_blocks=2, vocab_size=31)
ALPHA = 0.3


def make_targets():
    """Three rows: two entries, none, one."""
    return TargetBatch(
        offsets_N1=torch.tensor([0, 2, 2, 3]),
        ids=torch.tensor([4, 9, 30]),
        probabilities=torch.tensor([0.25, 0.75, 1.0]),
        labels_N=torch.tensor([9, 0, 30]),
        base_log_probabilities_N=torch.tensor([-1.0, -2.0, -0.5]),
    )


@pytest.mark.parametrize("mixture_lambda", [None, 0.25])
def test_loss_and_gradients_equal_dense_autograd(mixture_lambda):
    torch.manual_seed(0)
    objective = MemoryWithLoss(CONFIG, alpha=ALPHA, mixture_lambda=mixture_lambda)
    plain = Memory(CONFIG)
    plain.load_state_dict(objective.state_dict())
    plain = plain.double()
    inputs = torch.randn(3, CONFIG.input_size)
    loss, sums = objective(inputs, make_targets())
    loss.backward()

    logs = torch.log_softmax(plain.head(plain(inputs.double())), dim=1)
    teacher = torch.zeros(3, CONFIG.vocab_size, dtype=torch.float64)
    teacher[0, 4], teacher[0, 9], teacher[2, 30] = 0.25, 0.75, 1.0
    label = logs[torch.arange(3), make_targets().labels_N]
    if mixture_lambda is not None:
        base = make_targets().base_log_probabilities_N.double().exp()
        label = torch.log((1 - mixture_lambda) * base + mixture_lambda * label.exp())
    kl = (torch.xlogy(teacher, teacher) - teacher * logs).sum(1)
    alphas = torch.tensor(
        [ALPHA, 0.0, ALPHA], dtype=torch.float64
    )  # a row without a teacher is pure cross entropy
    expected = (alphas * kl - (1 - alphas) * label).mean()
    expected.backward()

    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        sums.double(), torch.stack([kl.sum(), -label.sum(), torch.tensor(3.0).double()]), rtol=1e-6, atol=1e-6
    )
    for (name, parameter), other in zip(objective.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_names_are_those_of_a_plain_memory_and_so_is_the_start():
    torch.manual_seed(5)
    objective = MemoryWithLoss(CONFIG, alpha=ALPHA)
    torch.manual_seed(5)
    plain = Memory(CONFIG)
    assert list(objective.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, objective.state_dict()[name]), name


def test_a_head_that_is_lent_gives_the_same_loss_and_gradients_as_a_frozen_copy():
    config = dataclasses.replace(CONFIG, head_bias=True, logit_softcap=3.0)
    torch.manual_seed(0)
    copied = MemoryWithLoss(config, alpha=ALPHA)
    copied.head.requires_grad_(False)
    torch.nn.init.normal_(copied.head.bias)
    lent = MemoryWithLoss(dataclasses.replace(config, shared_head="a base's"), alpha=ALPHA)
    own = {name: tensor for name, tensor in copied.state_dict().items() if not name.startswith("head.")}
    lent.load_state_dict(own)
    opened = []

    @contextlib.contextmanager
    def lender():
        opened.append(True)
        yield copied.head.weight, copied.head.bias
        opened.append(False)

    lent.lend_head(lender)
    inputs, labels = torch.randn(3, CONFIG.input_size), torch.tensor([3, 0, 30])
    for objective in (copied, lent):
        objective(inputs, make_targets())[0].backward()
    assert opened == [True, False]  # the backward needs it no more
    for (name, one), other in zip(lent.named_parameters(), copied.parameters(), strict=False):
        assert torch.equal(one.grad, other.grad), name
    assert torch.equal(lent(inputs, None, labels), copied(inputs, None, labels))
    hidden = torch.randn(2, CONFIG.hidden_size)
    assert torch.equal(lent.head.logits(hidden), copied.head.logits(hidden))


def test_label_log_probabilities():
    objective = MemoryWithLoss(CONFIG, alpha=ALPHA)
    inputs, labels = torch.randn(3, CONFIG.input_size), torch.tensor([3, 0, 30])
    plain = Memory(CONFIG)
    plain.load_state_dict(objective.state_dict())
    expected = torch.log_softmax(plain.head(plain(inputs)), dim=1)[torch.arange(3), labels]
    torch.testing.assert_close(objective.label_log_probabilities(inputs, labels), expected)


def test_all_logits_are_those_of_the_plain_head():
    config = dataclasses.replace(CONFIG, head_bias=True, logit_scale=0.5, logit_softcap=2.0)
    objective, plain = MemoryWithLoss(config, alpha=ALPHA), Memory(config)
    torch.nn.init.normal_(objective.head.bias)
    plain.load_state_dict(objective.state_dict())
    hidden = torch.randn(3, config.hidden_size)
    assert torch.equal(objective.head.logits(hidden), plain.head(hidden))

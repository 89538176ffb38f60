"""Scale and soft cap of logits, against their formula."""

import torch

from mlpmem_ds.models.logit_transform import LogitTransform


def test_it_is_its_formula() -> None:
    logits = torch.linspace(-40, 40, 9, dtype=torch.float64)
    assert torch.equal(LogitTransform()(logits), logits) and LogitTransform().is_identity
    torch.testing.assert_close(LogitTransform(scale=0.5)(logits), logits / 2)
    torch.testing.assert_close(LogitTransform(scale=0.5, softcap=3.0)(logits), 3 * torch.tanh(logits / 2 / 3))
    assert not LogitTransform(scale=0.5).is_identity and not LogitTransform(softcap=3.0).is_identity

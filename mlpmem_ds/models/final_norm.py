"""Training only: the norm between a base's last layer and its output head, for a memory that starts as the
base: where it stands, and which of our kinds it is.

No table of model names: the norm is found by structure, and its kind by trying it on numbers.

Shapes: N rows, D width of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from mlpmem_ds.models.memory import make_norm
from mlpmem_ds.models.memory_config import NORMS
from mlpmem_ds.models.structure import (
    UnknownStructureError,
    decoder,
    decoder_layers,
    names_of_parts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)  # of norms that do not say theirs


def final_norm(model: PreTrainedModel, layers_path: str | None = None) -> nn.Module | None:
    """The norm that a base applies to its last layer's output before its head reads it; None: it has none.

    It stands next to the list of layers, and behind it, as a rule. The model may be on the device `meta`.

    Raises:
        UnknownStructureError: several could be it, or a matrix stands next to the layers, which may come
            between.
    """
    layers, owner = decoder_layers(model, layers_path), decoder(model)
    parts = list(owner.children())
    places = [number for number, part in enumerate(parts) if part is layers]
    norms = [
        (number, part)
        for number, part in enumerate(parts)
        if "norm" in type(part).__name__.lower() and not list(part.children())
    ]
    behind = [part for number, part in norms if places and number > places[0]]
    found = behind or [part for _, part in norms]
    matrices = [part for part in parts if isinstance(part, nn.Linear)]
    if not places or len(found) > 1 or matrices:
        reason = "several norms" if len(found) > 1 else "a matrix" if matrices else "no list of layers"
        raise UnknownStructureError(
            f"what {type(model).__name__} does between its last layer and its head is not understood:"
            f" {reason} among {names_of_parts(owner)}"
        )
    return found[0] if found else None


@torch.no_grad()
def kind_of_norm(norm: nn.Module) -> tuple[str, float]:
    """(one of `NORMS`, epsilon) of ours that gives what this module gives, with the same names of weights.

    The module may be on the device `meta`: it is tried with random weights.

    Raises:
        UnknownStructureError: there is none.
    """
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(norm).to_empty(device="cpu").float()
    for parameter in trial.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weights = trial.state_dict()
    width = max((len(weight) for weight in weights.values()), default=64)
    scales_N1 = torch.tensor([1.0, 1.0, 30.0, 1e-3, 1e-3])[:, None]  # small rows show the epsilon
    rows_ND = scales_N1 * torch.randn(len(scales_N1), width, generator=generator)
    if not weights and isinstance(shape := getattr(norm, "normalized_shape", None), tuple | list):
        rows_ND = scales_N1 * torch.randn(len(scales_N1), *shape, generator=generator)
    expected_ND = trial(rows_ND)
    for kind, epsilon in _candidates(norm, len(weights)):
        ours = make_norm(kind, rows_ND.shape[1], epsilon)
        if set(ours.state_dict()) != set(weights):
            continue
        ours.load_state_dict(weights)
        if torch.allclose(ours(rows_ND), expected_ND, rtol=1e-4, atol=1e-5):
            return kind, epsilon
    raise UnknownStructureError(
        f"the final norm of the base, {type(norm).__name__}, is of no known kind ({', '.join(NORMS)})"
    )


def _candidates(norm: nn.Module, num_vectors: int) -> Iterator[tuple[str, float]]:
    own = [value for value in vars(norm).values() if isinstance(value, float) and 0 < value < 0.1]
    for kind, vectors in NORMS.items():
        if vectors == num_vectors:
            for epsilon in dict.fromkeys((*own, *_EPSILONS)):
                yield kind, epsilon

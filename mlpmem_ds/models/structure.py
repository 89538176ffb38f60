"""The parts of a base, found by structure: its decoder, its list of layers, a layer's MLP, its output head.

No table of model names: the decoder's layers are the longest list of equal modules that each hold an MLP.
What is not understood is an error that shows what was seen.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.

Shapes: D width of the base, F width inside its MLP, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


class UnknownStructureError(ValueError):
    """The base's layers, MLP or output head could not be found; the message names what was seen and the
    remedy."""


def resolve_layer(spec: int | float, num_layers: int) -> int:
    """The layer index in `[0, num_layers)` of an index (negative from the end) or of a fraction of the depth
    in (0, 1).

    0.7 of 36 layers is index 25, the layer that 70 % of the layers precede. Raises ValueError when out of
    range.
    """
    remedy = f"give an index in [-{num_layers}, {num_layers - 1}] or a fraction of the depth, such as 0.7"
    if isinstance(spec, bool) or not isinstance(spec, int | float):
        raise ValueError(f"a layer must be a number, not {spec!r}: {remedy}")
    if isinstance(spec, int):
        if not -num_layers <= spec < num_layers:
            raise ValueError(f"layer {spec} does not exist in a model of {num_layers} layers: {remedy}")
        return spec % num_layers
    if not 0.0 < spec < 1.0:
        raise ValueError(f"layer {spec} is not a fraction of the depth: {remedy}")
    # The small term undoes the rounding of products such as 0.29 * 100 = 28.999...
    return min(math.floor(spec * num_layers + 1e-9), num_layers - 1)


def decoder_layers(model: PreTrainedModel, path: str | None = None) -> nn.ModuleList:
    """The decoder's layers in order: those at `path`, or the longest list of equal modules that each hold an
    MLP.

    Lists inside another list (the experts of a layer) do not count. Raises UnknownStructureError when there
    is no such list, or two of the same length.
    """
    if path is not None:
        return _layers_at(model, path)
    candidates: list[tuple[str, nn.ModuleList]] = []
    for name, module in _outer_lists(decoder(model)):
        same_class = len({type(layer) for layer in module}) == 1
        if same_class and all(find_mlp(layer) is not None for layer in module):
            candidates.append((name, module))
    longest = max((len(module) for _, module in candidates), default=0)
    lists = [module for _, module in candidates if len(module) == longest]
    if len(lists) != 1:
        reason = (
            "several lists that could be its layers"
            if lists
            else "no list of equal layers that each hold an MLP"
        )
        raise UnknownStructureError(structure_message(model, reason))
    return lists[0]


def output_head(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(weight_VD, bias_V or None)` of the head that turns the final hidden state into logits; the live
    tensors.

    The exact logits are `logit_transform(model)(final @ weight.T + bias)`. Raises UnknownStructureError when
    there is no such head.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise UnknownStructureError(
            f"{type(model).__name__} has no linear output head (get_output_embeddings gives"
            f" {type(head).__name__}): give a causal language model"
        )
    bias = getattr(head, "bias", None)
    return weight, bias if isinstance(bias, torch.Tensor) else None


def decoder(model: PreTrainedModel) -> nn.Module:
    """The language model inside a wrapper: OPT's decoder, the text part of a model that sees pictures."""
    inner: nn.Module = model.get_decoder()
    return inner


def _outer_lists(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in root.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            if len(child) > 0:
                yield path, child
        else:
            yield from _outer_lists(child, f"{path}.")


def _layers_at(model: PreTrainedModel, path: str) -> nn.ModuleList:
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        raise UnknownStructureError(structure_message(model, f"nothing at the path {path!r}")) from None
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        reason = f"{path!r} is a {type(layers).__name__}, not a list of layers"
        raise UnknownStructureError(structure_message(model, reason))
    return layers


def find_mlp(layer: nn.Module) -> nn.Module | None:
    """The module whose input is the MLP's input: the MLP by name, or by its pair of matrices D -> F -> D."""
    children = dict(layer.named_children())
    for name in _MLP_NAMES:
        if name in children:
            return children[name]
    first_matrices = _expansions(layer)
    if len(first_matrices) == 1:  # no MLP module at all: OPT's fc1 and fc2 lie in the layer itself
        return first_matrices[0]
    holders = [
        child
        for name, child in children.items()
        if "att" not in name.lower() and "att" not in type(child).__name__.lower() and _expansions(child)
    ]
    return holders[0] if len(holders) == 1 else None


def _expansions(module: nn.Module) -> list[nn.Linear]:
    """The linear children that some later linear child maps back: `D -> F` before `F -> D`."""
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    return [
        first
        for index, first in enumerate(linears)
        if any(
            (second.out_features, second.in_features) == (first.in_features, first.out_features)
            for second in linears[index + 1 :]
        )
    ]


def structure_message(model: PreTrainedModel, reason: str) -> str:
    """What an `UnknownStructureError` says: the reason, the lists of modules that exist, and the remedy."""
    lists = [(name, module) for name, module in _outer_lists(model)]
    seen = ", ".join(
        f"{name}: {len(module)} x {type(module[0]).__name__} ({names_of_parts(module[0])})"
        for name, module in lists
    )
    return (
        f"the structure of {type(model).__name__} is not understood: {reason}. Its lists of modules"
        f" are {seen or 'none'}. Name the list of decoder layers, for example extract_keys --layers-path"
        f" {lists[0][0] if lists else 'model.layers'}"
    )


def names_of_parts(module: nn.Module) -> str:
    """The names of a module's children, for a message."""
    return ", ".join(name for name, _ in module.named_children()) or "no parts"

"""The base, a frozen Hugging Face causal language model: the capture of its hidden states.

Place in the pipeline: `extract_keys` reads keys and memory inputs here, `evaluate` reads the base's logits,
and the joint model reads the memory's input. Layers, MLPs and heads are found by `structure`.

The hooks of a `Capture` exist only while a forward runs, and are removed also when it fails.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.

Shapes: B sequences, S tokens, D width of the base, V vocabulary, `...` any leading dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .capture_point import CapturePoint
from .logit_transform import LogitTransform
from .structure import (
    UnknownStructureError,
    decoder,
    decoder_layers,
    find_mlp,
    names_of_parts,
    output_head,
    resolve_layer,
    structure_message,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class CapturedStates:
    """The states of one forward, without gradients, in the base's dtype, on the devices where they arose.

    `states` holds a `[B, S, D]` tensor for each point as it was asked for; `final_BSD` is what the output
    head reads.
    """

    states: Mapping[CapturePoint, torch.Tensor]
    final_BSD: torch.Tensor


def configured_transform(model: PreTrainedModel) -> LogitTransform:
    """What this base's config says that it does after its output head; nothing is run.

    Knows scales (Cohere's `logit_scale`, Granite's `logits_scaling`, Falcon-H1's `lm_head_multiplier`) and
    soft caps (Gemma's `final_logit_softcapping`).
    """
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale=scale, softcap=None if softcap is None else float(softcap))


@torch.no_grad()
def logit_transform(
    model: PreTrainedModel, *, with_head: Callable[[], AbstractContextManager[None]] = nullcontext
) -> LogitTransform:
    """What this base does after its output head, read from its config and checked by one forward of eight
    tokens, which also checks that no token sees those after it.

    `with_head` is opened around each use of the head's weights outside the model, for a base whose weights
    lie elsewhere until they are used. Raises UnknownStructureError when the result differs from the model's
    logits, and for a model that is not causal.
    """
    transform = configured_transform(model)
    with with_head():
        vocab_size = len(output_head(model)[0])
    # The embeddings of a base that is spread over devices may lie on disk.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    probe_BS = (torch.arange(8, device=device) % vocab_size).repeat(2, 1)
    probe_BS[1, -1] = 8 % vocab_size  # another last token
    expected_BSV = model(input_ids=probe_BS, use_cache=False).logits.float()
    if not bool(torch.isfinite(expected_BSV).all()):
        return transform  # damaged weights: the reader of the states says at which position and layer
    # The same operations in the same dtype: what is left is the order of operations.
    tolerance = 8 * torch.finfo(model.dtype).eps * max(1.0, float(expected_BSV.abs().max()))
    if float((expected_BSV[0, :-1] - expected_BSV[1, :-1]).abs().max()) > tolerance:
        raise UnknownStructureError(
            f"{type(model).__name__} lets a token see those after it, as encoders do: give a causal language"
            " model"
        )
    final_BSD = capture(model, [])(probe_BS).final_BSD
    with with_head():
        weight_VD, bias_V = output_head(model)
        if final_BSD.shape[-1] == weight_VD.shape[1]:
            logits_BSV = transform(
                nn.functional.linear(final_BSD.to(weight_VD.device), weight_VD, bias_V)
            ).float()
            if float((logits_BSV - expected_BSV.to(logits_BSV.device)).abs().max()) <= tolerance:
                return transform
    raise UnknownStructureError(
        f"{type(model).__name__} does something between its final hidden state and its logits that is not a"
        " known scale or soft cap: its log-probabilities cannot be computed from hidden states; use another"
        " base"
    )


class Capture:
    """Reads hidden states of a base at given points.

    Called with `input_ids [B, S]` it runs one forward of the transformer, without the output head, without
    padding, cache or gradients, and returns `CapturedStates`. `recording` lets the caller run the forward.
    Not for use by two threads at a time on one model: both would be recorded.
    """

    def __init__(
        self, model: PreTrainedModel, points: Sequence[CapturePoint], *, layers_path: str | None = None
    ) -> None:
        self._model = model
        self._places = {point: [_place(model, part, layers_path) for part in point.parts] for point in points}

    def __call__(self, input_ids_BS: torch.Tensor) -> CapturedStates:
        num_sequences, num_tokens = input_ids_BS.shape
        with torch.no_grad(), self.recording(num_sequences, num_tokens) as states:
            output = self._model.base_model(input_ids=input_ids_BS, use_cache=False)
        final = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        self.check(states)
        return CapturedStates(states=states, final_BSD=final)

    @contextmanager
    def recording(self, num_sequences: int, num_tokens: int) -> Iterator[dict[CapturePoint, torch.Tensor]]:
        """While open, each forward on `[num_sequences, num_tokens]` ids fills the yielded dict."""
        states: dict[CapturePoint, torch.Tensor] = {}
        with ExitStack() as hooks:
            # OPT flattens its hidden states to [B * S, D] before the MLP: the shape of the ids restores them.
            shape = (num_sequences, num_tokens, -1)
            for point, places in self._places.items():
                parts: dict[int, torch.Tensor] = {}
                for number, (module, reads_input) in enumerate(places):
                    keep = partial(_keep, states, point, parts, number, len(places))
                    hooks.enter_context(_hook(module, reads_input, shape, keep))
            yield states

    def check(self, states: Mapping[CapturePoint, torch.Tensor]) -> None:
        """Raises UnknownStructureError when a point gave nothing in the forward just run."""
        silent = [point for point in self._places if point not in states]
        if silent:
            raise UnknownStructureError(
                structure_message(self._model, f"the layers did not run where {silent[0]} should be read")
            )


class Taps:
    """Reads the states at some points, by name, in a forward that may be compiled.

    torch.compile can follow a hook that exists when it starts, but not the making of one, which `Capture`
    does at every call. So these hooks stay on their modules, and do nothing between the calls of `read`. They
    go when `remove` is called. Not for use by two threads at a time on one model.
    """

    def __init__(
        self, model: PreTrainedModel, points: Mapping[str, CapturePoint], *, layers_path: str | None = None
    ) -> None:
        """Raises ValueError for a layer out of range and UnknownStructureError when the structure is not
        understood."""
        self._taps = {
            name: [_Tap(model, part, layers_path) for part in point.parts] for name, point in points.items()
        }

    def read(
        self, forward: Callable[..., Any], num_sequences: int, num_tokens: int, **arguments: Any
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """`forward(**arguments)`, a forward of the model on `[num_sequences, num_tokens]` ids, and the states
        [B, S, D].

        Raises UnknownStructureError when nothing passed a point.
        """
        for tap in itertools.chain.from_iterable(self._taps.values()):
            # OPT flattens its hidden states to [B * S, D] before the MLP: the shape of the ids restores them.
            tap.shape, tap.state = (num_sequences, num_tokens, -1), None
        states: dict[str, torch.Tensor] = {}
        try:
            output = forward(**arguments)
        finally:
            for name, taps in self._taps.items():
                parts = [tap.state for tap in taps if tap.state is not None]
                if len(parts) == len(taps):
                    states[name] = _joined(parts)
                for tap in taps:
                    tap.shape, tap.state = None, None
        for name in self._taps:
            if name not in states:
                raise UnknownStructureError(f"the layers did not run where the {name} should be read")
        return output, states

    def remove(self) -> None:
        """Take the hooks off the model; may be called again."""
        for tap in itertools.chain.from_iterable(self._taps.values()):
            tap.remove()


class _Tap:
    """One point of `Taps`: a hook that keeps the state of a forward while `shape` is set."""

    def __init__(self, model: PreTrainedModel, point: CapturePoint, layers_path: str | None) -> None:
        module, reads_input = _place(model, point, layers_path)
        self.shape: tuple[int, int, int] | None = None
        self.state: torch.Tensor | None = None
        # Bound methods: a deep copy of the model has hooks of its own.
        if reads_input:
            self.remove = module.register_forward_pre_hook(self._before, with_kwargs=True).remove
        else:
            self.remove = module.register_forward_hook(self._after).remove

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.shape is not None:
            self.state = _first_tensor((*args, *kwargs.values())).reshape(self.shape)

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.shape is not None:
            self.state = _state_of_output(output).reshape(self.shape)


def capture(
    model: PreTrainedModel, points: Sequence[CapturePoint], *, layers_path: str | None = None
) -> Capture:
    """A `Capture` of these points; `capture(model, points)(input_ids_BS)` gives their states.

    Raises ValueError for a layer out of range and UnknownStructureError when the structure is not understood.
    """
    return Capture(model, points, layers_path=layers_path)


def resolved_point(model: PreTrainedModel, point: CapturePoint, layers_path: str | None) -> CapturePoint:
    """The point with its layers counted from the front. Raises ValueError where there is no such layer."""
    count = len(decoder_layers(model, layers_path))
    return CapturePoint(
        layer=resolve_layer(point.layer, count),
        point=point.point,
        earlier=tuple(resolve_layer(layer, count) for layer in point.earlier),
    )


def state_width(model: PreTrainedModel, point: CapturePoint) -> int:
    """Numbers in the state at a point. That behind the final norm is as wide as the head, which is narrower
    than the layers in a few bases."""
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    final = output_head(model)[0].shape[1] if point.point == "final_norm" else width
    return len(point.earlier) * width + int(final)


def _place(model: PreTrainedModel, point: CapturePoint, layers_path: str | None) -> tuple[nn.Module, bool]:
    """The module to hook for this point, and whether its input (else its output) is the state."""
    layers = decoder_layers(model, layers_path)
    index = resolve_layer(point.layer, len(layers))
    if point.point == "final_norm":
        if index != len(layers) - 1:
            raise ValueError(
                f"final_norm is read after the last layer, not at layer {point.layer} of {len(layers)}: "
                "give layer -1, or another point"
            )
        return decoder(model), False
    if point.point == "layer_output":
        return layers[index], False
    mlp = find_mlp(layers[index])
    if mlp is None:
        raise UnknownStructureError(
            structure_message(
                model, f"no MLP in layer {index}, whose parts are {names_of_parts(layers[index])}"
            )
        )
    return mlp, True


@contextmanager
def _hook(
    module: nn.Module,
    reads_input: bool,
    shape: tuple[int, int, int],
    keep: Callable[[torch.Tensor], None],
) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(_first_tensor((*args, *kwargs.values())).reshape(shape))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(_state_of_output(output).reshape(shape))

    register_before = module.register_forward_pre_hook
    handle = register_before(before, with_kwargs=True) if reads_input else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _keep(
    states: dict[CapturePoint, torch.Tensor],
    point: CapturePoint,
    parts: dict[int, torch.Tensor],
    number: int,
    count: int,
    state: torch.Tensor,
) -> None:
    """Put a part of a point's state with the others; with the last of a forward the state is whole."""
    parts[number] = state
    if len(parts) == count:
        states[point] = _joined([parts.pop(number) for number in range(count)])


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Side by side, where the last one is: a base may be spread over devices."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.to(parts[-1].device) for part in parts], dim=-1)


def _state_of_output(output: Any) -> torch.Tensor:
    state: torch.Tensor = (
        output.last_hidden_state if hasattr(output, "last_hidden_state") else _first_tensor(output)
    )
    return state


def _first_tensor(values: Any) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
    raise UnknownStructureError(
        "a hooked module passes no tensor: name the list of decoder layers (extract_keys --layers-path)"
    )

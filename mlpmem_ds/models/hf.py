"""The joint model for Hugging Face users: a frozen base and its memory behind `generate` and
`from_pretrained`.

Place in the pipeline: `convert_checkpoint` builds it from a trained memory, `generate` and every outside user
load it: `p(y|x) = (1 - lmbda) p_base(y|x) + lmbda p_mem(y|h(x))`, where `h(x)` is one of the base's hidden
states.

`logits` are log-probabilities of the mixture (float32; softmax gives the mixture back, and a temperature
applies after mixing). How much of the memory there is at a position is said by a gate (see `mixture`), by
default the same `lmbda` everywhere; at `lmbda = 0` they are the base's own logits, so that nothing at all
changes. The memory has no cache: the caches are the base's.

This file is written into every exported directory as remote code, together with those that it imports
(hf_config, mixture, memory, backbone, structure, quantized, and what those import): all import torch,
transformers and the standard library only.

Shapes: B sequences, S tokens, K kept positions, D width of the base, V vocabulary, `...` any leading
dimensions.
"""

import copy
import inspect
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .backbone import Taps
from .capture_point import CapturePoint
from .gates import open_gate
from .hf_config import MemoryAugmentedConfig
from .memory import Memory, NormalLinear, OnePlusLayerNorm, OnePlusRMSNorm
from .memory_config import DEFAULT_LAMBDA, MemoryConfig
from .mixture import Constant, GateInputs, StoredGate, log_mixture_of_logits
from .quantized import Int8Linear, quantize_linears
from .structure import decoder_layers, output_head, resolve_layer

MEMORY_INPUT = "memory_input"
"""Name of the state that the memory reads; a gate finds it in `GateInputs.states` too."""


Mixture = Callable[[torch.Tensor, torch.Tensor, float | torch.Tensor], torch.Tensor]


class MemoryAugmentedLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose next-token distribution is the mixture of its base's and its memory's.

    `mixture`, the function `mixture.log_mixture_of_logits`, may be replaced by a faster one, such as the
    package's `models.mixture_on_device.mixture_on_device`, which is two launches on CUDA; it need not be
    differentiable.

    `gate` finds the memory's weight at each position; `set_gate` takes another.

    A forward can be compiled whole wherever the base's can: `model.generate(...,
    cache_implementation="static")` on CUDA does so for each step, with CUDA graphs.
    """

    config_class = MemoryAugmentedConfig
    # The base decides what it supports when it is built; nothing here attends.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: MemoryAugmentedConfig,
        *,
        base: PreTrainedModel | None = None,
        memory: Memory | None = None,
    ) -> None:
        """From a config alone the parts start fresh; `from_parts` passes trained ones, which are kept as they
        are."""
        if config.base_config is None or config.memory_config is None:
            raise ValueError(
                "a MemoryAugmentedConfig needs base_config and memory_config before a model can be built"
            )
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        config.base_config = self.base.config
        self.memory = Memory(MemoryConfig.from_dict(config.memory_config)) if memory is None else memory
        # transformers initializes what is not marked as initialized: parts that were given are.
        for part in (base, memory):
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.gate: StoredGate = open_gate(config.gate, config.lmbda)
        self._taps = self._make_taps()
        self._can_compile_fullgraph = bool(self.base._can_compile_fullgraph)
        self.mixture: Mixture = log_mixture_of_logits
        self._base_parameters = frozenset(inspect.signature(self.base.forward).parameters)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, memory: Any = None, *args: Any, lmbda: float | None = None, **kwargs: Any
    ) -> Any:
        """An exported joint model; or a base (directory, Hub name or model) joined with a memory.

        Args:
            name: the export; with `memory`, the base.
            memory: a `PretrainedMemory`, or the directory of one (see there).
            lmbda: the memory's weight in [0, 1]; default: the export's, or `DEFAULT_LAMBDA`.
            args, kwargs: of transformers' own `from_pretrained`.

        Raises:
            ValueError: the memory was trained for another kind of base, or lmbda is out of range.
        """
        if memory is None:
            loaded = super().from_pretrained(name, *args, **kwargs)
            if lmbda is not None:
                (loaded[0] if isinstance(loaded, tuple) else loaded).lmbda = lmbda
            return loaded
        if not isinstance(memory, PretrainedMemory):
            memory = PretrainedMemory.from_pretrained(memory)
        is_model = isinstance(name, PreTrainedModel)
        base = name if is_model else AutoModelForCausalLM.from_pretrained(name, *args, **kwargs)
        return memory.attach(base, lmbda=lmbda)

    @classmethod
    def from_parts(
        cls,
        base_model: PreTrainedModel,
        memory_module: Memory,
        *,
        lmbda: float,
        input_point: CapturePoint,
        provenance: dict[str, Any] | None = None,
        layers_path: str | None = None,
        vocabulary_sha256: str = "",
        cast: bool = True,
    ) -> "MemoryAugmentedLM":
        """Join a loaded base and a trained memory, in eval mode; no weight of the base is copied.

        The memory is cast to the base's dtype and moved to its device (unless `cast` is false: then it stays
        as it is), and a training head is replaced by the plain one with the same weight. Raises ValueError
        when the sizes of the two do not fit, or lmbda or the point are invalid.
        """
        memory = _plain_memory(memory_module)
        if cast:
            memory = memory.to(dtype=base_model.dtype, device=base_model.device)
        config = MemoryAugmentedConfig(
            base_config=base_model.config,
            memory_config=memory.config.to_dict(),
            lmbda=lmbda,
            input_layer=resolve_layer(input_point.layer, len(decoder_layers(base_model, layers_path))),
            input_point=input_point.point,
            layers_path=layers_path,
            provenance=provenance,
            vocabulary_sha256=vocabulary_sha256,
            dtype=base_model.dtype,
        )
        _check_sizes(memory.config, base_model, input_point)
        model = cls(config, base=base_model, memory=memory)
        if base_model.generation_config is not None:
            model.generation_config = copy.deepcopy(base_model.generation_config)
        return model.eval()

    @property
    def lmbda(self) -> float:
        """The memory's weight in [0, 1]; it may be set at any time, and is saved with the model.

        Setting it makes it the weight at every position: a gate that varied it is replaced.
        """
        return float(self.config.lmbda)

    @lmbda.setter
    def lmbda(self, value: float) -> None:
        self.set_gate(Constant(value))

    def set_gate(self, gate: StoredGate) -> None:
        """Let this gate find the memory's weight at each position; it is saved with the model."""
        is_read = dict(gate.reads) == dict(self.gate.reads)
        del self.gate  # torch lets no plain object take the name of a module
        self.gate = gate
        self.config.gate = gate.settings()
        if isinstance(gate, Constant):
            self.config.lmbda = float(gate.lmbda)
        if not is_read:
            self._taps.remove()
            self._taps = self._make_taps()

    def quantize_memory(self) -> "MemoryAugmentedLM":
        """Round the memory's matrices to int8, in place, for decoding; gives the model. See quantized.py.

        On a CPU a step reads a quarter of float32's bytes for the memory, and takes less time by as much.
        Such a model is neither trained nor saved.
        """
        quantize_linears(self.memory)
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises ValueError after `quantize_memory`: the float weights are gone."""
        if isinstance(self.memory.head, Int8Linear):
            raise ValueError("a model with an int8 memory is not saved: save it before quantize_memory()")
        return super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One forward of the base, and of the memory on the kept positions.

        `logits [B, K, V]`: float32 log-probabilities of the mixture, or the base's own logits when lmbda is
        0. `labels` follow the convention of transformers: aligned with `input_ids`, shifted here, -100
        ignored, mean loss in nats.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids if "position_ids" in self._base_parameters else None,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        base_keeps = "logits_to_keep" in self._base_parameters
        if base_keeps:
            arguments["logits_to_keep"] = logits_to_keep
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        if isinstance(self.gate, Constant) and self.gate.lmbda == 0.0:
            # A shortcut, not another way to mix: the memory need not run, and the logits stay as they are.
            output = self.base(**arguments, **kwargs, return_dict=True)
            logits = output.logits if base_keeps else _kept(output.logits, logits_to_keep)
        else:
            shape = (input_ids if input_ids is not None else inputs_embeds).shape  # type: ignore[union-attr]
            output, states = self._taps.read(
                self.base, shape[0], shape[1], **arguments, **kwargs, return_dict=True
            )
            base_logits_BKV = output.logits if base_keeps else _kept(output.logits, logits_to_keep)
            kept_states = {name: _kept(state_BSD, logits_to_keep) for name, state_BSD in states.items()}
            logits = self._mixture(base_logits_BKV, kept_states)
        loss = None
        if labels is not None:
            loss = self.base.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_arguments
            )
        joint = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.get("past_key_values"),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return joint if as_dict else joint.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.LongTensor, inputs_embeds: torch.FloatTensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base's own: some bases watch their context length or build masks of their own here."""
        base: Any = self.base
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.base.get_output_embeddings()
        return head

    def _make_taps(self) -> Taps:
        config: Any = self.config
        points = {**self.gate.reads, MEMORY_INPUT: _checked_point(config, self.base)}
        taps = Taps(self.base, points, layers_path=config.layers_path)
        weakref.finalize(self, taps.remove)  # the base may outlive this model
        return taps

    def _mixture(self, base_logits_BKV: torch.Tensor, states: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.memory(self.memory.cast(states[MEMORY_INPUT]))
        memory_logits_BKV = self.memory.head(hidden).to(base_logits_BKV.device)
        lmbda = self.gate(
            GateInputs(
                base_logits=base_logits_BKV,
                memory_logits=(memory_logits_BKV,),
                memory_states=(hidden,),
                states=states,
            )
        )
        # A compiler makes one kernel of the plain function by itself.
        mixture = log_mixture_of_logits if torch.compiler.is_compiling() else self.mixture
        return mixture(base_logits_BKV, memory_logits_BKV, lmbda)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for what no checkpoint filled; the base's parts go to the base's own rule.
        norms = nn.LayerNorm | nn.RMSNorm | OnePlusLayerNorm | OnePlusRMSNorm
        if isinstance(module, NormalLinear | norms):
            module.reset_parameters()


@dataclass(frozen=True, kw_only=True)
class PretrainedMemory:
    """A trained memory without its base, and which of the base's states it reads.

    `lmbda` is None where none was chosen. `provenance` holds plain values about how it was made.
    """

    module: Memory = field(repr=False)
    input_layer: int
    input_point: str
    lmbda: float | None
    vocabulary_sha256: str
    provenance: dict[str, Any] = field(repr=False)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "PretrainedMemory":
        """From the output of a training (`weights/config.json` and `weights/model*.safetensors`), or
        from an export.

        Raises:
            ValueError: there is no memory, or one that is damaged.
        """
        root = Path(path)
        if not (root / "weights" / "config.json").is_file():
            joint, report = MemoryAugmentedLM.from_pretrained(
                str(path), dtype="auto", output_loading_info=True
            )
            if report["missing_keys"]:  # transformers fills them at random and goes on
                raise ValueError(
                    f"the files of {path} lack {len(report['missing_keys'])} weights: export the memory again"
                )
            settings = joint.config
            return cls(
                module=joint.memory,
                input_layer=settings.input_layer,
                input_point=settings.input_point,
                lmbda=settings.lmbda,
                vocabulary_sha256=settings.vocabulary_sha256,
                provenance=dict(settings.provenance),
            )
        from safetensors.torch import load_file  # comes with transformers

        try:
            description = json.loads((root / "weights" / "config.json").read_bytes())
            with torch.device("meta"):
                module = Memory(MemoryConfig.from_dict(description["memory"]))
            weights: dict[str, torch.Tensor] = {}
            for file in sorted((root / "weights").glob("model*.safetensors")):  # one, or several
                weights |= load_file(file)
            module.load_state_dict(weights, assign=True)
            provenance = description["provenance"]
            layer, point = provenance["input_layer"], provenance["input_point"]
        except Exception as error:  # safetensors raises a family of its own
            raise ValueError(
                f"{root} holds no whole memory ({type(error).__name__}: {error}): finish its training"
            ) from error
        return cls(
            module=module.eval().requires_grad_(False),
            input_layer=layer,
            input_point=point,
            lmbda=None,
            vocabulary_sha256=provenance.get("vocabulary_sha256", ""),
            provenance=provenance,
        )

    def attach(self, base: PreTrainedModel, *, lmbda: float | None = None) -> MemoryAugmentedLM:
        """The joint model of a loaded base and this memory; the base's weights are not copied.

        Raises:
            ValueError: the base has another width, vocabulary or depth than the memory was trained for.
        """
        weight = lmbda if lmbda is not None else self.lmbda
        return MemoryAugmentedLM.from_parts(
            base,
            self.module,
            lmbda=DEFAULT_LAMBDA if weight is None else weight,
            input_point=CapturePoint(layer=self.input_layer, point=self.input_point),  # type: ignore[arg-type]
            layers_path=self.provenance.get("input_layers_path"),
            provenance=self.provenance,
            vocabulary_sha256=self.vocabulary_sha256,
        )


def register() -> None:
    """Make transformers' Auto classes know the joint model, and `save_pretrained` write this code with the
    weights."""
    AutoConfig.register(MemoryAugmentedConfig.model_type, MemoryAugmentedConfig, exist_ok=True)
    AutoModelForCausalLM.register(MemoryAugmentedConfig, MemoryAugmentedLM, exist_ok=True)
    MemoryAugmentedConfig.register_for_auto_class("AutoConfig")
    MemoryAugmentedLM.register_for_auto_class("AutoModelForCausalLM")


def _checked_point(config: MemoryAugmentedConfig, base: PreTrainedModel) -> CapturePoint:
    layer = resolve_layer(config.input_layer, len(decoder_layers(base, config.layers_path)))
    return CapturePoint(layer=layer, point=config.input_point)  # type: ignore[arg-type]


def _check_sizes(memory: MemoryConfig, base_model: PreTrainedModel, point: CapturePoint) -> None:
    weight_VD, _ = output_head(base_model)
    if memory.vocab_size != weight_VD.shape[0]:
        raise ValueError(
            f"the memory predicts {memory.vocab_size} tokens and the base {weight_VD.shape[0]}: "
            "they must come from one vocabulary; give the base that the memory was trained for"
        )
    text = base_model.config.get_text_config(decoder=True)
    width = weight_VD.shape[1] if point.point == "final_norm" else text.hidden_size
    if memory.input_size != width:
        raise ValueError(
            f"the memory reads vectors of {memory.input_size} numbers and {point.point} of the base has"
            f" {width}: give the base that the memory was trained for"
        )


def _plain_memory(memory: Memory) -> Memory:
    """A memory with the same tensors and a plain head; casting it leaves the given one alone."""
    with torch.device("meta"):
        plain = Memory(memory.config)
    plain.load_state_dict(memory.state_dict(), assign=True)
    return plain


def _kept(values_BSD: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions for which the base gives logits, by transformers' rule: the last ones (0: all), or
    indices."""
    if isinstance(logits_to_keep, int):
        return values_BSD[:, -logits_to_keep:] if logits_to_keep else values_BSD
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
        return values_BSD[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(values_BSD, logits_to_keep[..., None], dim=1)
    return values_BSD[:, logits_to_keep]


# Inside an exported directory transformers itself finds the classes through config.json; registering there as
# well would replace an installed package's classes.
if not __name__.startswith("transformers_modules"):
    register()

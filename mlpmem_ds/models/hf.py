"""The joint model for Hugging Face users: a frozen base and its memory behind `generate` and
`from_pretrained`.

Place in the pipeline: `convert_checkpoint` builds it from a trained memory, every user loads it: `p(y|x) =
(1 - lmbda) p_base(y|x) + lmbda p_mem(y|h(x))`, where `h(x)` is one of the base's hidden states.

`logits` are those of the mixture (float32; softmax gives the mixture back, and a temperature applies after
mixing), with the base's log-sum-exp in each row: they become the base's own as the weight does 0. How much of
the memory there is at a position is said by a gate (see `mixture`), by default the same `lmbda` everywhere;
at `lmbda = 0` nothing at all changes. A *bank* is several memories of one base under one gate. Caches are the
base's, and carry what a gate (`history_cache`) and memories with a window (`window_cache`) need of the tokens
before.

This file and those that it imports are written into every export: torch, transformers, standard library only.

Shapes: B sequences, S tokens, K kept positions, D width of the base, V vocabulary, M memories, `...` any
leading dimensions.
"""

import copy
import inspect
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .backbone import Taps
from .capture_point import CapturePoint
from .forward_docs import FORWARD, documented
from .gates import open_gate
from .hf_config import MemoryAugmentedConfig, checked_threshold
from .joint_forward import JointForward
from .joint_parts import (
    checked_gate,
    copied_gate,
    described_memories,
    input_points,
    joint_config,
    plain_memory,
    token_mask_of,
    windows_of,
)
from .joint_step import BaseOnly, Mixture, Step
from .kept_card import keep_card, replace_blank_card
from .memory import Memory, NormalLinear, OnePlusLayerNorm, OnePlusRMSNorm
from .memory_config import DEFAULT_LAMBDA, MemoryConfig
from .mixture import Constant, StoredGate, log_mixture_of_logits
from .pretrained_memory import PretrainedMemory
from .quantized import Int8Linear, quantize_linears
from .quantized_base import arguments_of_load, prepare_to_save


class MemoryAugmentedLM(PreTrainedModel, GenerationMixin):
    r"""A causal language model whose next-token distribution is the mixture of its base's and its memory's.

    It is a transformers model: `generate`, `save_pretrained`, `pipeline` and the Auto classes work as with
    the base. `from_pretrained` loads an export, or joins a base with a memory; `join` does so with loaded
    parts. The base's weights are not changed by anything here. A forward can be compiled whole wherever the
    base's can (`generate(…, cache_implementation="static")`).

    Args:
        config: a `MemoryAugmentedConfig` with base and memory.
        base, memory, further: trained parts, which are kept as they are; without them all start fresh.

    Attributes:
        lmbda (`float`): the memory's weight, in [0, 1], at every position; 0: the base's own logits, bit for
            bit. Setting it replaces a gate and its threshold.
        gate: gives the weight of the memory, or of each of a bank, at each position; `set_gate` takes
            another.
        base_only_threshold (`float`, *optional*): where the weight is lower, it is 0, and in decoding the
            memory does not run where that is foreseen; `base_only` counts.
        mixture (`Callable`): the function `mixture.log_mixture_of_logits`; it may be replaced by a faster
            one, such as `mixture_on_device` of the package, two launches on CUDA, which need not be
            differentiable.
        base, memories: the parts; the memories of a bank are several.
    """

    config_class = MemoryAugmentedConfig
    # The base decides what it supports when it is built; nothing here attends.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"^gate\."]  # of a gate that a named λ replaces
    generate: Any  # transformers' own types leave out models of other packages

    def __init__(
        self,
        config: MemoryAugmentedConfig,
        *,
        base: PreTrainedModel | None = None,
        memory: Memory | None = None,
        further: Sequence[Memory] = (),
    ) -> None:
        """From a config alone the parts start fresh; `join` passes trained ones, all of them, which are
        kept as they are."""
        if config.base_config is None or config.memory_config is None:
            raise ValueError(
                "a MemoryAugmentedConfig needs base_config and memory_config before a model can be built"
            )
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        config.base_config = self.base.config
        fresh = (
            Memory(MemoryConfig.from_dict(described["memory_config"]))
            for described in described_memories(config)[0 if memory is None else 1 + len(further) :]
        )
        self.memory = next(fresh) if memory is None else memory
        self.further_memories = nn.ModuleList([*further, *fresh])
        # transformers initializes what is not marked as initialized: parts that were given are.
        for part in (base, memory, *further):
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True  # type: ignore[assignment]
        for each in self.memories:
            each.share_head(self.get_output_embeddings())
        self._windows = windows_of(self.memories)
        self.gate: StoredGate = checked_gate(open_gate(config.gate, config.lmbda), len(self.memories))
        self.base_only = BaseOnly()
        self._taps = self._make_taps()
        self._can_compile_fullgraph = bool(self.base._can_compile_fullgraph)
        self._is_stateful = bool(self.base._is_stateful)  # then no step can be taken back
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
            memory: a `PretrainedMemory`, or what `load_memory` reads; or a list of several, a bank.
            lmbda: the memory's weight in [0, 1]; default: what the export has, or `DEFAULT_LAMBDA`.
            args, kwargs: of transformers' own `from_pretrained`; a `quantization_config` holds for the base.

        Raises:
            ValueError: a memory was trained for another kind of base, or lmbda is out of range.
        """
        if memory is None:
            loaded = super().from_pretrained(name, *args, **arguments_of_load(name, kwargs))
            joint = loaded[0] if isinstance(loaded, tuple) else loaded
            if getattr(joint, "hf_quantizer", None):
                joint._make_taps_anew()  # a module at which a state is read may have been replaced
            if lmbda is not None:
                joint.lmbda = lmbda
                joint.base_only_threshold = kwargs.get("base_only_threshold")
            return loaded
        memories = memory if isinstance(memory, list | tuple) else [memory]
        is_model = isinstance(name, PreTrainedModel)
        base = name if is_model else AutoModelForCausalLM.from_pretrained(name, *args, **kwargs)
        trained = [each if isinstance(each, PretrainedMemory) else load_memory(each) for each in memories]
        return cls.join(base, trained, lmbda=lmbda)

    @classmethod
    def join(
        cls,
        base: PreTrainedModel,
        memories: Sequence[PretrainedMemory],
        *,
        lmbda: float | None = None,
        gate: StoredGate | None = None,
        cast: bool = True,
    ) -> "MemoryAugmentedLM":
        """A loaded base with a memory, or with a bank of several, in eval mode; the base is not copied.

        The modules of the memories stay as they are: the model has others, with a plain head in the place of
        a training one, in the base's dtype and on its device.

        Args:
            base: that all memories were trained for.
            memories: one or more.
            lmbda: the memory's weight in [0, 1], which those of a bank share equally; default: the first
                one's own, or `DEFAULT_LAMBDA`. A single memory brings its own gate and threshold, too.
            gate: finds the weight at each position, in the place of lmbda.
            cast: False: the memories keep their dtype and device, and what is in a file stays there.

        Raises:
            ValueError: the base has another width, vocabulary or depth than a memory was trained for, or
                lmbda is out of range.
        """
        weight = memories[0].lmbda if lmbda is None else lmbda
        config = joint_config(base, memories, lmbda=DEFAULT_LAMBDA if weight is None else weight)
        first, *further = [plain_memory(each.module) for each in memories]
        if cast:
            for module in (first, *further):
                module.to(dtype=base.dtype, device=base.device)
        joint = cls(config, base=base, memory=first, further=further)
        if base.generation_config is not None:
            joint.generation_config = copy.deepcopy(base.generation_config)
        if gate is None and lmbda is None and len(memories) == 1:
            joint.base_only_threshold = memories[0].base_only_threshold
            if memories[0].gate is not None:
                gate = copied_gate(memories[0].gate, base.device)
        if gate is not None:
            joint.set_gate(gate)
        return joint.eval()

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memory; of a bank, all of them."""
        return (self.memory, *self.further_memories)

    @property
    def lmbda(self) -> float:
        """The memory's weight in [0, 1]; it may be set at any time, and is saved with the model.

        Setting it makes it the weight at every position: a gate that varied it is replaced, and its threshold
        is none: with a gate set again later, set its threshold again. The memories of a bank share λ equally.
        """
        return float(self.config.lmbda)

    @lmbda.setter
    def lmbda(self, value: float) -> None:
        self.set_gate(Constant(value))
        self.base_only_threshold = None

    def set_gate(self, gate: StoredGate) -> None:
        """Let this gate find the memory's weight at each position; it is saved with the model.

        Raises ValueError for a gate of another number of memories.
        """
        gate = checked_gate(gate, len(self.memories))
        is_read = dict(gate.reads) == dict(self.gate.reads)
        del self.gate  # torch lets no plain object take the name of a module
        self.gate = gate
        self.config.gate = gate.settings()
        if isinstance(gate, Constant):
            self.config.lmbda = float(gate.lmbda)
        if not is_read:
            self._make_taps_anew()

    @property
    def base_only_threshold(self) -> float | None:
        """A weight below this is 0; in decoding the memory is not run where that is foreseen. None: never.

        It may be set at any time, and is saved with the model; setting `lmbda` makes it None.
        """
        return self.config.base_only_threshold

    @base_only_threshold.setter
    def base_only_threshold(self, value: float | None) -> None:
        self.config.base_only_threshold = checked_threshold(value)

    def quantize_memory(self) -> "MemoryAugmentedLM":
        """Round the memories' matrices to int8, in place, for decoding; gives the model. See quantized.py.

        On a CPU a step reads a quarter of float32's bytes for the memory, and takes less time by as much. A
        head that is the base's stays as it is. Such a model is neither trained nor saved.
        """
        for memory in self.memories:
            quantize_linears(memory)
        return self

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', and the model card of the export that was loaded goes along, where the directory
        has none. Raises ValueError after `quantize_memory`, and where the base was quantized by another
        library than bitsandbytes: the float weights are gone."""
        if any(isinstance(module, Int8Linear) for module in self.memory.modules()):
            raise ValueError("a model with an int8 memory is not saved: save it before quantize_memory()")
        prepare_to_save(self.base)
        saved = super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            keep_card(self, save_directory)
        return saved

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """The end of transformers' `push_to_hub`, which would send a blank card to a new repository."""
        replace_blank_card(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @documented(FORWARD)
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
        token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids if "position_ids" in self._base_parameters else None,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        output, logits = self._forward_of_parts().run({**arguments, **kwargs}, logits_to_keep, token_mask)
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
        reads_padding = self.gate.history is not None or self._windows.sizes
        if reads_padding and (mask := token_mask_of(inputs, kwargs.get("attention_mask"))) is not None:
            inputs["token_mask"] = mask
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Of transformers' `generate`: what the base's forward takes, such as `token_type_ids`, it takes here
        too."""
        own = inspect.signature(self.forward).parameters
        base: Any = self.base
        base._validate_model_kwargs({name: each for name, each in model_kwargs.items() if name not in own})

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Of transformers' `generate`: a base whose cache is not `past_key_values`, such as Mamba or RWKV,
        has none here, and reads the whole text at each step. Raises ValueError for `inputs_embeds`, of which
        the steps after the first know nothing."""
        if "past_key_values" not in self._base_parameters:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError("a base without past_key_values generates from tokens: give input_ids")
            generation_config.use_cache = False
        parent: Any = super()
        return parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        """Of transformers' `generate`: false for a base with a cache of its own kind, such as MiniMax."""
        base: Any = self.base
        return bool(base._supports_default_dynamic_cache())

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Of transformers' assisted generation. Raises ValueError for one that leaves layers out."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit leaves out layers that a memory may read: let the base be the assistant"
                " (assistant_model=model.base)"
            )
        parent: Any = super()
        return parent._get_candidate_generator(generation_config, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def _make_taps_anew(self) -> None:
        self._taps.remove()
        self._taps = self._make_taps()

    def _make_taps(self) -> Taps:
        config: Any = self.config
        points = {**self.gate.reads, **input_points(config, self.base)}
        taps = Taps(self.base, points, layers_path=config.layers_path)
        weakref.finalize(self, taps.remove)  # the base may outlive this model
        return taps

    def _forward_of_parts(self) -> JointForward:
        step = Step(
            memories=self.memories,
            gate=self.gate,
            mixture=self.mixture,
            threshold=self.base_only_threshold,
            base_only=self.base_only,
        )
        return JointForward(
            base=self.base,
            parameters=self._base_parameters,
            taps=self._taps,
            windows=self._windows,
            step=step,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for what no checkpoint filled; the base's parts go to the base's own rule.
        norms = nn.LayerNorm | nn.RMSNorm | OnePlusLayerNorm | OnePlusRMSNorm
        if isinstance(module, NormalLinear | norms):
            module.reset_parameters()


def load_memory(path: str | Path) -> PretrainedMemory:
    """The memory of a training's output, or of an export with its weight: λ or gate, and threshold.

    Raises:
        ValueError: there is no memory, one that is damaged, or a bank of several.
    """
    if (Path(path) / "weights" / "config.json").is_file():
        return PretrainedMemory.from_training(path)
    joint, report = MemoryAugmentedLM.from_pretrained(str(path), dtype="auto", output_loading_info=True)
    if report["missing_keys"]:  # transformers fills them at random and goes on
        raise ValueError(
            f"the files of {path} lack {len(report['missing_keys'])} weights: export the memory again"
        )
    if len(joint.memories) > 1:
        raise ValueError(
            f"{path} holds a bank of {len(joint.memories)} memories: give the output of one training"
        )
    return PretrainedMemory(
        module=joint.memory,
        **CapturePoint.of(joint.config).settings(),
        lmbda=joint.config.lmbda,
        gate=None if isinstance(joint.gate, Constant) else joint.gate,
        base_only_threshold=joint.base_only_threshold,
        vocabulary_sha256=joint.config.vocabulary_sha256,
        provenance=dict(joint.config.provenance),
    )


def register() -> None:
    """Make transformers' Auto classes know the joint model, and `save_pretrained` write this code with the
    weights."""
    AutoConfig.register(MemoryAugmentedConfig.model_type, MemoryAugmentedConfig, exist_ok=True)
    AutoModelForCausalLM.register(MemoryAugmentedConfig, MemoryAugmentedLM, exist_ok=True)
    MemoryAugmentedConfig.register_for_auto_class("AutoConfig")
    MemoryAugmentedLM.register_for_auto_class("AutoModelForCausalLM")


# Inside an exported directory transformers itself finds the classes through config.json; registering there as
# well would replace an installed package's classes.
if not __name__.startswith("transformers_modules"):
    register()

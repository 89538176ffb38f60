"""The configuration of the joint model: what an export's config.json holds.

This file travels with exported models as remote code: it imports torch, transformers and the standard library
only.
"""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .memory_config import DEFAULT_LAMBDA, MemoryConfig
from .mixture import checked_lmbda


class MemoryAugmentedConfig(PretrainedConfig):
    """The base's config, the memory's config, and how they are joined.

    `base_config` is the base's full config (a dict with its `model_type`, or the object), `memory_config` the
    dict of a `MemoryConfig`, `lmbda` the memory's weight in [0, 1], `gate` what finds the weight at each
    position (a dict with a `kind` of `gates.GATES` and its settings; None: `lmbda` everywhere),
    `input_layer`, `input_point` and `input_earlier_layers` what the memory reads (see `CapturePoint`),
    `further_memories` the same four and `provenance` of the other memories of a bank, `base_only_threshold`
    the weight below which a memory is left out, `layers_path` the base's list of layers where it cannot be
    found by structure, `provenance` plain values about how the memory was made, `vocabulary_sha256` the
    fingerprint of the tokenizer's vocabulary, empty when unknown.
    """

    model_type = "mlpmem"
    sub_configs = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: dict[str, Any] | PretrainedConfig | None = None,
        memory_config: dict[str, Any] | None = None,
        lmbda: float = DEFAULT_LAMBDA,
        gate: dict[str, Any] | None = None,
        input_layer: int = -1,
        input_point: str = "ffn_input",
        input_earlier_layers: Sequence[int] = (),
        further_memories: list[dict[str, Any]] | None = None,
        base_only_threshold: float | None = None,
        layers_path: str | None = None,
        provenance: dict[str, Any] | None = None,
        vocabulary_sha256: str = "",
        **kwargs: Any,
    ) -> None:
        # The base's config comes last: transformers' own __init__ hands its attention implementation, None by
        # default, down to every nested config that it finds, and a live base would lose its own.
        self.base_config: PretrainedConfig | None = None
        self.memory_config = (
            None if memory_config is None else MemoryConfig.from_dict(memory_config).to_dict()
        )
        self.lmbda = checked_lmbda(lmbda)
        self.gate = {"kind": "constant"} if gate is None else dict(gate)
        self.input_layer = input_layer
        self.input_point = input_point
        self.input_earlier_layers = list(input_earlier_layers)
        self.further_memories = [dict(memory) for memory in further_memories or ()]
        self.base_only_threshold = checked_threshold(base_only_threshold)
        self.layers_path = layers_path
        self.provenance = dict(provenance or {})
        self.vocabulary_sha256 = vocabulary_sha256
        # Each submodel ties its own weights; there is nothing to tie across them.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
        if base_config is not None:
            self.base_config = _config_of_base(base_config)
            if self._attn_implementation is not None:
                self._attn_implementation = self._attn_implementation  # hands it down

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The base's: generation reads the shapes of the caches and the vocabulary from it."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def vocab_size(self) -> int:
        return int(self._of_base("vocab_size"))

    @property
    def hidden_size(self) -> int:
        return int(self._of_base("hidden_size"))

    @property
    def num_hidden_layers(self) -> int:
        return int(self._of_base("num_hidden_layers"))

    @property
    def max_position_embeddings(self) -> int:
        return int(self._of_base("max_position_embeddings"))

    def _of_base(self, name: str) -> Any:
        # AttributeError, so that hasattr() answers no for a config that holds no base yet or a base without
        # the field.
        if self.base_config is None:
            raise AttributeError(f"a MemoryAugmentedConfig without a base has no {name}")
        return getattr(self.base_config.get_text_config(decoder=True), name)


def checked_threshold(value: float | None) -> float | None:
    """`value` as a float, or None. Raises ValueError unless it is a number in [0, 1]."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"base_only_threshold is a weight of the memory, a number in [0, 1], not {value!r}")
    return float(value)


def _config_of_base(values: dict[str, Any] | PretrainedConfig) -> PretrainedConfig:
    if isinstance(values, PretrainedConfig):
        return copy.deepcopy(values)
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            "base_config has no model_type: give the dict that the base's config.to_dict() returns"
        )
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ValueError(
            f"this transformers does not know the base's model type {model_type!r}: upgrade it"
        ) from error
    return config

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
    r"""The base's config, the memory's config, and how they are joined.

    It stands for its base: `vocab_size`, `hidden_size`, `num_hidden_layers`, `max_position_embeddings` and
    `get_text_config()` are the base's.

    Args:
        base_config (`dict` or `PretrainedConfig`): the base's full config, as a dict with its `model_type`.
        memory_config (`dict`): of a `MemoryConfig`, the memory's shape.
        lmbda (`float`, *optional*, defaults to 0.25): the memory's weight in the mixture, in [0, 1].
        gate (`dict`, *optional*): what finds the weight at each position, by its `kind` of `gates.GATES` and
            its settings; None: `lmbda` everywhere.
        input_layer (`int`, *optional*, defaults to -1): the layer of the base that the memory reads, from the
            end where negative.
        input_point (`str`, *optional*, defaults to `"ffn_input"`): where in that layer; see `CapturePoint`.
        input_earlier_layers (`list[int]`, *optional*): layers whose states stand before that one's.
        further_memories (`list[dict]`, *optional*): the other memories of a bank, each with `memory_config`,
            the three settings of its input, and `provenance`.
        base_only_threshold (`float`, *optional*): the weight below which a memory is left out; None: never.
        layers_path (`str`, *optional*): the base's list of layers, where it cannot be found by structure.
        provenance (`dict`, *optional*): plain values about how the memory was made.
        vocabulary_sha256 (`str`, *optional*): fingerprint of the tokenizer's vocabulary; empty when unknown.
        kwargs: of `PretrainedConfig`.

    Raises:
        ValueError: a weight lies outside [0, 1], or the base's type is missing or unknown.

    Example:
        >>> from mlpmem_ds.models.hf import MemoryAugmentedLM
        >>> from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
        >>> base = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
        >>> memory = {"input_size": 16, "hidden_size": 8, "intermediate_size": 32, "num_blocks": 2}
        >>> config = MemoryAugmentedConfig(base, {**memory, "vocab_size": 50}, lmbda=0.3)
        >>> MemoryAugmentedLM(config).lmbda
        0.3
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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', to which its Auto classes hand what a model is loaded with. A λ that is named
        there replaces the gate, and is meant without the gate's threshold."""
        if "lmbda" in kwargs:
            kwargs = {"gate": {"kind": "constant"}, "base_only_threshold": None, **kwargs}
        return super().from_dict(config_dict, **kwargs)

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

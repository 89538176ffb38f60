"""Part of `generate` and `run_lm_eval`: the joint model and its tokenizer, of an export or of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from mlpmem_ds.core.errors import DamagedDataError, UserError, first_line
from mlpmem_ds.core.files import read_sealed_json
from mlpmem_ds.engines.hidden_states import DTYPES, resolve_dtype
from mlpmem_ds.engines.model_files import check_generation_file, model_file
from mlpmem_ds.engines.tokenizer_loading import load_tokenizer
from mlpmem_ds.formats.corpus import vocabulary_sha256
from mlpmem_ds.formats.gates import read_gate
from mlpmem_ds.formats.model_directory import absence_of, check_model_files, fault_of
from mlpmem_ds.formats.trained_models import read_weights
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.generation_settings import complete_settings
from mlpmem_ds.models.hf import MemoryAugmentedLM
from mlpmem_ds.models.hf_config import MemoryAugmentedConfig
from mlpmem_ds.models.mixture_on_device import mixture_on_device
from mlpmem_ds.stages.conversion.inputs import (
    EXPORT_FILE,
    ExportInputs,
    OpenedMemory,
    in_order_of_gate,
    open_parts,
)
from mlpmem_ds.stages.conversion.joining import join_parts
from mlpmem_ds.stages.conversion.lambda_choice import choose_lambda
from mlpmem_ds.stages.generation.options import JointOptions


class QuantizationError(UserError):
    """A model is not loaded with a base of few bits."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a joint model is made from; its weights are not read yet, but those of trained memories."""

    options: JointOptions
    tokenizer: Any
    context: int | None
    """tokens that the base reads"""
    parts: ExportInputs | None
    """None: an export"""
    lmbda: float | None
    """the memory's weight, in the place of an export's own gate, and then without its threshold"""

    @property
    def base_sha256(self) -> str | None:
        """Fingerprint of the base that the memories were trained for; None where an export does not say
        it."""
        if self.parts is not None:
            return self.parts.base_sha256
        path = model_file(self.options.model, EXPORT_FILE)
        inputs = {} if path is None else read_sealed_json(path).get("inputs", {})
        return inputs.get("base") if isinstance(inputs, dict) else None

    def load(
        self,
        *,
        device: torch.device,
        dtype: str,
        device_map: str | dict[str, Any] | None,
        quantization: Any = None,
    ) -> MemoryAugmentedLM:
        """The joint model, on the device or spread over several; `quantization` is of the base, as
        transformers takes it.

        Raises:
            UserError: it cannot be loaded; QuantizationError: not with this quantization.
        """
        options, parts = self.options, self.parts
        if parts is None:
            joint = load_model(
                options.model,
                device=device,
                dtype=dtype,
                device_map=device_map,
                quantization=quantization,
            )
            if self.lmbda is not None:
                joint.lmbda = self.lmbda
            if options.base_only_threshold is not None:
                joint.base_only_threshold = options.base_only_threshold
            return joint
        weights_dtype = DTYPES[resolve_dtype(dtype, device)]
        try:
            base = load_base(
                options.model,
                dtype=weights_dtype,
                device=device,
                device_map=device_map,
                quantization_config=quantization,
            )
        except ValueError as error:
            kind = UserError if quantization is None else QuantizationError
            raise kind(f"--model {options.model}: {fault_of(options.model, error)}") from error
        joint = join_parts(base, parts, cast=True, threshold=options.base_only_threshold, flag="--memory")
        return _mixing_on(device, joint)


def open_source(options: JointOptions, *, lmbda: float | None = None) -> Source:
    """Find and check what the flags name; `lmbda` is the weight that a flag names, None: the export's own
    gate, or that of --gate.

    Raises:
        UserError: there is no such model, or its parts do not belong together.
    """
    if not options.memory:
        settings, tokenizer = read_export(
            options.model, or_else=", or add --memory, which is joined with it here"
        )
        context = getattr(settings, "max_position_embeddings", None)
        return Source(options=options, tokenizer=tokenizer, context=context, parts=None, lmbda=lmbda)
    parts = _open_trained(options, lmbda)
    text = AutoConfig.from_pretrained(options.model).get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    return Source(options=options, tokenizer=parts.tokenizer, context=context, parts=parts, lmbda=lmbda)


def _open_trained(options: JointOptions, lmbda: float | None) -> ExportInputs:
    """The finished trainings of --memory, and the gate, checked against the base."""
    for root in options.memory:
        if (root / EXPORT_FILE).is_file():
            raise UserError(
                f"--memory {root} is an export already: give it with --model, or the output directory of"
                " launch/train.py"
            )
    gate = None if options.gate is None else read_gate(options.gate)
    memories = [
        OpenedMemory(root=root, trained=read_weights(root, flag="--memory")) for root in options.memory
    ]
    weight, rule = choose_lambda(lmbda, gate=gate)
    return open_parts(
        in_order_of_gate(memories, gate, flag="--memory"),
        model=options.model,
        gate=gate,
        lmbda=weight,
        lmbda_rule=rule,
        tokenizer=options.tokenizer,
        flag="--memory",
    )


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: Any = None,
) -> MemoryAugmentedLM:
    """The joint model by this package's classes: no code from the export is run.

    Its weights are read straight to `device`, or spread over devices by `device_map`.

    Raises:
        DamagedDataError: it is not an export, or its files lack weights (transformers would fill them at
            random and continue).
        QuantizationError: its library does not take it.
    """
    weights_dtype = DTYPES[resolve_dtype(dtype, device)]
    # A CPU needs no map, and then no accelerate.
    placement = device_map or (None if device.type == "cpu" else {"": device})
    remedy = "run tools/convert_checkpoint.py again"
    try:
        loaded: Any = MemoryAugmentedLM.from_pretrained(
            name,
            dtype=weights_dtype,
            device_map=placement,
            output_loading_info=True,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each library under the loader raises a family of its own
        if quantization is not None:  # its files were read and compared before: it is the library's fault
            raise QuantizationError(
                f"--model {name} cannot be loaded with this quantization ({first_line(error)}): its library"
                " must be of a version that transformers takes, and know the device; in floats the base"
                " needs none"
            ) from error
        raise DamagedDataError(f"--model {name} cannot be loaded ({error}): {remedy}") from error
    model, report = loaded
    if faults := {kind: sorted(map(str, values)) for kind, values in report.items() if values}:
        raise DamagedDataError(f"--model {name} does not hold the whole model ({faults}): {remedy}")
    return _mixing_on(device, model.eval())


def _mixing_on(device: torch.device, joint: MemoryAugmentedLM) -> MemoryAugmentedLM:
    if device.type != "cpu":
        joint.mixture = mixture_on_device
    return joint


def read_export(model: str, *, or_else: str = "") -> tuple[MemoryAugmentedConfig, Any]:
    """The export's configuration and tokenizer; `or_else` is what else the command takes, for the remedy.

    Raises:
        UserError: there is no export of that name, or its tokenizer is missing or another one.
        DamagedDataError: a file does not have its checksum.
    """
    check_model_files(model, flag="--model")
    try:
        settings = AutoConfig.from_pretrained(model)
    except Exception as error:  # transformers and the Hub raise families of their own
        if absence := absence_of(model, error=error):
            raise UserError(
                f"--model {model}: {absence}; expected is the output of tools/convert_checkpoint.py"
            ) from error
        raise UserError(
            f"--model {model} cannot be read ({first_line(error)}): give the output of "
            "tools/convert_checkpoint.py"
        ) from error
    if not isinstance(settings, MemoryAugmentedConfig):
        raise UserError(
            f"--model {model} holds a {settings.model_type} model without a memory: give the output of "
            f"tools/convert_checkpoint.py{or_else}"
        )
    check_generation_file(model)
    tokenizer = load_tokenizer(model, flag="--model")
    if settings.vocabulary_sha256 and vocabulary_sha256(tokenizer) != settings.vocabulary_sha256:
        raise UserError(
            f"--model {model} has a tokenizer of {len(tokenizer)} tokens that is not the one it was made"
            " with: run tools/convert_checkpoint.py again"
        )
    return settings, tokenizer


def settings_of_export(model: MemoryAugmentedLM, tokenizer: Any) -> GenerationConfig:
    """The model's own settings of generation with every end token and the rows that are never taken."""
    return complete_settings(
        model.generation_config,
        base=model.base,
        tokenizer=tokenizer,
        num_rows=model.memory.config.vocab_size,
    )

"""A frozen base whose weights are cut over the ranks: ZeRO stage 3 without an optimizer.

Part of `train`, where the base that runs next to the training is larger than one device. The base's weights
are cut while they are loaded, so that no device ever holds them whole (rank 0 reads the files into its host's
memory, once); a forward gathers those of one module after another, and those of about one layer ahead. What
is computed is the same, number by number.

A forward is collective: see `StateSource.is_collective`. Every rank must run the same modules in the same
order, which holds for all models but those that call an expert's own module only where one of its tokens asks
for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mlpmem_ds.engines.deepspeed.library import import_deepspeed, silenced
from mlpmem_ds.engines.hidden_states import DTYPES, TransformersSource
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.models.structure import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PERSISTENT_WIDTHS = 10
"""parameters of at most so many times the width (norms, biases) stay whole on each rank"""


class ShardedSource(TransformersSource):
    """A StateSource whose ranks hold the base together. The process group must stand (`set_up_distributed`).

    Raises:
        UserError: as TransformersSource.
    """

    is_collective = True

    def numbers_held(self) -> int:
        """How many numbers of the base this rank holds now: its shards, and what is whole."""
        return sum(parameter.ds_tensor.numel() + parameter.numel() for parameter in _parameters(self.model))

    def numbers(self) -> int:
        """How many numbers the base has."""
        return sum(parameter.ds_numel for parameter in _parameters(self.model))

    def _load(
        self, path: str, attention: str, device_map: str | dict[str, Any] | None, offload_folder: Path | None
    ) -> PreTrainedModel:
        assert device_map is None and offload_folder is None, (
            "a base is cut over the ranks, or spread over their devices"
        )
        if self.dtype_name == "float16" and self.device.type == "cpu":
            raise ValueError(
                "DeepSpeed cuts no base in float16 on CPUs: leave out --base-sharding, or extract the keys"
                " with --dtype bfloat16"
            )
        deepspeed = import_deepspeed()
        with _cut_while_loading(self._ds_config()):
            model: Any = load_base(path, dtype=DTYPES[self.dtype_name], device=None, attention=attention)
        model.to(self.device)  # what is not cut: buffers
        # The transformer without its head is what runs, as `Capture` calls it: the gathers follow its
        # modules.
        body = model.base_model
        persistent = _PERSISTENT_WIDTHS * model.config.get_text_config().hidden_size
        ahead = sum(
            parameter.ds_numel for parameter in _parameters(decoder_layers(model, self.layers_path)[0])
        )
        with silenced():
            self._engine, *_ = deepspeed.initialize(
                model=body,
                config=self._ds_config(persistent=persistent, ahead=ahead),
                dist_init_required=False,
            )
        head = model.get_output_embeddings()
        if head is not None and body is not model:
            _gather_in_forward(head, deepspeed)
        return model.eval()

    @contextlib.contextmanager
    def _head(self) -> Iterator[None]:
        """The output head's weights, whole; collective."""
        deepspeed = import_deepspeed()
        head = self.model.get_output_embeddings()
        with deepspeed.zero.GatheredParameters([] if head is None else list(head.parameters())):
            yield

    def _ds_config(self, *, persistent: int = 0, ahead: int = 0) -> dict[str, Any]:
        """Numbers of the largest parameter that stays whole, and numbers that are gathered ahead of the
        module that runs."""
        return {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self.dtype_name == "bfloat16"},
            "fp16": {"enabled": self.dtype_name == "float16"},
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": persistent,
                "stage3_prefetch_bucket_size": ahead,
                "stage3_max_reuse_distance": 0,  # each module runs once
                # it would replace torch's, for the backward's sake, in the whole process
                "memory_efficient_linear": False,
            },
            "steps_per_print": 1_000_000_000,
        }


def _parameters(module: nn.Module) -> list[Any]:
    """DeepSpeed has put attributes of its own on them: ds_numel of the whole, ds_tensor, this rank's
    shard."""
    return list(module.parameters())


@contextlib.contextmanager
def _cut_while_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """While open, `from_pretrained` makes and fills its models in shards."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = HfDeepSpeedConfig(ds_config)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def _gather_in_forward(head: nn.Module, deepspeed: Any) -> None:
    """The head lies outside of what DeepSpeed's engine runs; only a forward of the whole model (the check of
    logits) uses it."""
    gathered = contextlib.ExitStack()

    def before(*_: Any) -> None:
        gathered.enter_context(deepspeed.zero.GatheredParameters(list(head.parameters())))

    def after(*_: Any) -> None:
        gathered.close()

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after, always_call=True)

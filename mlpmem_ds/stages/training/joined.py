"""Part of `train`: the objective that imitates the retriever joined with the base (`joined`).

loss = alpha KL((1 - lambda) p_base + lambda p_kNN || p_mem) + (1 - alpha) CE

The base's distribution is dense. It comes from the base's own final norm and head, at the memory's inputs; so
these have to be the last layer's output, or the state behind the norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.models.base_end import BaseEnd
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.models.logit_transform import LogitTransform
from mlpmem_ds.models.memory import make_norm
from mlpmem_ds.models.memory_config import MemoryConfig
from mlpmem_ds.models.objective import MemoryWithLoss
from mlpmem_ds.models.structure import UnknownStructureError
from mlpmem_ds.stages.training.base_files import open_base_files
from mlpmem_ds.stages.training.base_start import whole_start
from mlpmem_ds.stages.training.config import Config
from mlpmem_ds.stages.training.imitation import Imitation
from mlpmem_ds.stages.training.inputs import TrainingInputs

_FLOPS_OF_A_BASE_WEIGHT = 2  # forward alone


@dataclass(frozen=True, kw_only=True)
class Joined(Imitation):
    """The loss above; `joined_lambda` is its lambda, `mixture_lambda` that of the CE through the mixture."""

    joined_lambda: float

    needs_base_end = True

    @classmethod
    def of(cls, config: Config, memory: MemoryConfig) -> Joined:
        plain = Imitation.of(config, memory)
        return cls(
            memory=memory,
            alpha=plain.alpha,
            mixture_lambda=plain.mixture_lambda,
            joined_lambda=config.joined_lambda,
        )

    @property
    def flops_per_row(self) -> float:
        """With the product with the base's head, which is as large as the memory's or smaller."""
        width = min(self.memory.input_size, self.memory.hidden_size)
        return super().flops_per_row + _FLOPS_OF_A_BASE_WEIGHT * self.memory.vocab_size * width

    def make_module(self) -> nn.Module:
        return MemoryWithLoss(
            self.memory,
            alpha=self.alpha,
            mixture_lambda=self.mixture_lambda,
            joined_lambda=self.joined_lambda,
        )


def open_base_end(config: Config, inputs: TrainingInputs) -> BaseEnd:
    """The end of the base of `--model`, float32 on the CPU, out of its files.

    Raises:
        UserError: the memory's inputs do not say what the base's distribution is.
    """
    assert config.model is not None
    manifest = inputs.keys.manifest
    flag = f"--objective {config.objective}"
    try:
        return read_base_end(
            config.model,
            inputs.point,
            num_layers=manifest.input_num_layers,
            layers_path=manifest.input_layers_path,
            flag=flag,
        )
    except UnknownStructureError as error:
        raise UserError(
            f"{flag}, --model {config.model}: {error}: extract the keys with --input-layer -1 --input-point"
            " final_norm, which stands behind it, or use --objective imitation"
        ) from error


def read_base_end(
    model: str,
    point: CapturePoint,
    *,
    num_layers: int,
    layers_path: str | None = None,
    flag: str = "--objective joined",
) -> BaseEnd:
    """What stands between the state at `point` and the logits of a base, float32 on the CPU.

    Raises:
        UserError: the base's own layers stand between.
        UnknownStructureError: what stands there is not understood.
    """
    found = whole_start(
        open_base_files(model), point, num_layers=num_layers, layers_path=layers_path, flag=flag
    )
    tensors = {name: read() for name, read in found.readers.items()}
    norm: nn.Module | None = None
    if found.fields.get("final_norm", True):
        weight_VD = tensors["head.weight"]
        norm = make_norm(found.fields["norm"], weight_VD.shape[1], found.fields["norm_epsilon"])
        norm.load_state_dict(
            {
                name.removeprefix("final_norm."): tensor
                for name, tensor in tensors.items()
                if "final_norm." in name
            }
        )
    return BaseEnd(
        weight_VD=tensors["head.weight"],
        bias_V=tensors.get("head.bias"),
        norm=norm,
        transform=LogitTransform(scale=found.fields["logit_scale"], softcap=found.fields["logit_softcap"]),
    )

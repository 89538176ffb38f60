"""`train_base`: a small GPT-2-like base from scratch on a corpus.

For `extract_keys`, where no published base fits the corpus. `train_baseline` (stages/baseline) trains an
existing model on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mlpmem_ds.core.world import World
from mlpmem_ds.formats.trained_models import BaseManifest
from mlpmem_ds.stages.base.config import Config
from mlpmem_ds.stages.base.decoder_training import Learner, open_text, steps_of, train_decoder
from mlpmem_ds.stages.base.model import describe_model, new_gpt2, write_model
from mlpmem_ds.stages.training.defaults import default_learning_rate

__all__ = ["Config", "run"]


def run(config: Config, world: World) -> None:
    """Train, or continue, or say that it is complete; formats/README.md says what is written."""
    text = open_text(config, world)
    steps = steps_of(config, text)
    model = new_gpt2(config, text.corpus, text.length)
    if config.learning_rate is None:
        config = replace(config, learning_rate=default_learning_rate(model.num_parameters()))
    described = describe_model(model)
    learner = Learner(
        model=model,
        subject={"base": described},
        manifest=BaseManifest,
        describe=lambda result: BaseManifest(base=described, training=result),
        write=partial(write_model, model=model, corpus=text.corpus),
    )
    train_decoder(config, text, steps, learner, world)

"""Part of `fit_scaling`: the sizes of a preset as jobs, which `quality`'s runner runs.

Equal for all sizes: the text, the tokens that a base reads at most (it stops where its tuning perplexity no
longer falls), batches, the memory's blocks and epochs; a memory is as wide as its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlpmem_ds.benchmarks.quality.arms import BASE_OUTPUTS, MEMORIES, SUBJECT
from mlpmem_ds.benchmarks.quality.jobs import Job
from mlpmem_ds.benchmarks.quality.presets import Preset


@dataclass(frozen=True, kw_only=True)
class Size:
    """A base of so many layers and numbers in a state."""

    layers: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"


SIZES = {
    "tiny": (Size(layers=2, width=64), Size(layers=3, width=96), Size(layers=3, width=144)),
    "small": (
        *(Size(layers=2, width=96), Size(layers=3, width=144), Size(layers=4, width=216)),
        Size(layers=6, width=288),
    ),
}
_HELD_EQUAL = (
    "the text, at most the same tokens for each base (it stops where its tuning perplexity no longer falls),"
    " batches and learning rates, the blocks and epochs of the memory, which is as wide as its base; so"
    " parameters and compute grow together"
)


def held_equal() -> str:
    return _HELD_EQUAL


def make_jobs(preset: Preset, sizes: Sequence[Size], root: Path) -> list[Job]:
    """For each size a base, its keys and targets, a memory of the recommended recipe and a report, on the
    general text."""
    text, corpus = preset.general, str(root / "corpus")
    trainer = (*preset.trainer_flags, "--corpus", corpus)
    jobs = [
        _job(
            preset,
            "corpus",
            *("prepare-corpus", "--input", *text.inputs, *text.flags),
            *("--tokenizer", f"train:{preset.vocab_size}", "--max-bytes", f"{text.max_bytes:g}"),
            *("--block-size", preset.block_size, "--stride", preset.stride, "--processes", 1),
            *("--tuning-fraction", text.tuning_fraction, "--test-fraction", text.test_fraction),
            needs=(),
        )
    ]
    for size in sizes:
        at = root / size.name
        base, keys, index, targets = (str(at / stage) for stage in ("base", "keys", "index", "targets"))
        steps = {
            "base": (
                *("train-base", *trainer, *preset.base_flags),
                *("--num-layers", size.layers, "--hidden-size", size.width),
            ),
            "keys": (
                *("extract-keys", "--model", base, "--corpus", corpus, "--unit-positions", 16384),
                *(*BASE_OUTPUTS, *preset.reading_flags),
            ),
            "index": ("build-index", "--keys", keys),
            "targets": (
                *("write-targets", "--keys", keys, "--index", index, "--corpus", corpus),
                *preset.target_flags,
            ),
            "memory": (  # the base was trained on this text
                *("train", *trainer, "--model", base, "--keys", keys, "--targets", targets),
                *(*preset.memory_flags(starts_as_base=False), *MEMORIES[SUBJECT].flags),
            ),
            "report": (
                *("evaluate", "--model", base, "--corpus", corpus, "--memory", str(at / "memory")),
                *("--speed-positions", "none", "--samples", 0, *preset.reading_flags),
            ),
        }
        former = "corpus"
        for stage, words in steps.items():
            jobs.append(_job(preset, f"{size.name}/{stage}", *words, needs=("corpus", former)))
            former = f"{size.name}/{stage}"
    return jobs


def _job(preset: Preset, name: str, *words: object, needs: tuple[str, ...]) -> Job:
    return Job(
        name=name,
        words=tuple(map(str, words)),
        needs=tuple(dict.fromkeys(needs)),
        expected_seconds=preset.seconds.get(str(words[0]), 0.0),
    )

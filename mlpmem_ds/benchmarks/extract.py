"""Benchmark `extract`: corpus → **keys**, compared with the bare forward pass of the same model over the same
windows.

forward   Hugging Face's own `model(input_ids).logits`, batches of windows, nothing kept.
body      the same without the output head (`model.base_model`): no log-probability can be had from it.
int8      the stage `extract_keys` with int8 keys of at most 256 numbers, inputs in bf16, values and
          log-probabilities: the seconds of its units, which hold reading, forward, head, encoding, writing,
          checksums and fsync. Loading the model and fitting the codec happen once a run of any length,
          and are left out.
raw       the same with float16 keys.

Windows do not overlap here (stride = block), so that every arm computes the head for the same positions. All
arms run in this process, in turn. Memory and bytes are those of a model of one layer, whose speed allows
longer corpora: a process each for two lengths, the second eight times the first; bytes by `du` (blocks on
disk of the whole directory).

Shape legend: B windows, S tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mlpmem_ds.benchmarks.common import (
    Report,
    Row,
    check_output,
    in_child,
    median_of,
    peak_bytes_above_start,
    row_of,
    use_threads,
)
from mlpmem_ds.benchmarks.made_up_corpus import write_made_up_corpus
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.log import read_events
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.devices import device_of_rank
from mlpmem_ds.engines.hidden_states import DTYPES, resolve_dtype
from mlpmem_ds.formats.corpus import open_corpus
from mlpmem_ds.models.base_loading import load_base
from mlpmem_ds.stages import shared_flags
from mlpmem_ds.stages.keys import extract_keys

_logger = logging.getLogger("mlpmem_ds.benchmarks")
_LENGTH_RATIO = 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A GPT-2 of random weights."""

    name: str
    num_layers: int
    width: int
    vocab_size: int = 50257
    block_size: int = 512

    @property
    def num_heads(self) -> int:
        return max(1, self.width // 64)


_SMALL = Shape(name="d256", num_layers=4, width=256)
_HEADLINE = Shape(name="d768", num_layers=12, width=768)
_LARGE = Shape(name="d1600", num_layers=48, width=1600, block_size=1024)
_LONG = Shape(name="one_layer", num_layers=1, width=256, vocab_size=512)


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Extraction of keys compared with the bare forward pass, a 4-layer d=256 and a 12-layer d=768 GPT-2 of
    random weights; peak memory at two corpus lengths; bytes a position.

    The default sizes take about 3 minutes and 4 GB on two cores.
    """

    example: ClassVar[str] = "python tools/bench.py extract --output extract.json"

    output: Path = option("JSON file to write")
    positions: int = option(
        "positions of a run of the d=768 model; the d=256 one reads four times as many",
        4096,
        at_least=1,
    )
    long_positions: int = option("positions of the short corpus of the memory figures", 65536, at_least=1)
    runs: int = option("runs of each arm", 3, at_least=1)
    batch_windows: int = option("windows of 512 tokens that a forward pass reads at once", 4, at_least=1)
    dtype: Literal["auto", "float32", "bfloat16"] = option("of the forward pass", "auto")
    device: str = option(
        "auto, cpu, cuda or cuda:N; on a GPU a model of 1.5e9 parameters is measured too", "auto"
    )
    threads: int | None = shared_flags.threads()
    toy: bool = option("tiny models and corpora: does it run at all?", False)


def run(config: Config, world: World) -> None:
    """Measure and write the JSON."""
    check_output(config.output)
    use_threads(config.threads)
    report = Report("extract", config)
    device = device_of_rank(config.device, world)
    shapes = {_SMALL: 4 * config.positions, _HEADLINE: config.positions}
    if device.type == "cuda":
        shapes[_LARGE] = 16 * config.positions
    long, long_positions = _LONG, config.long_positions
    if config.toy:
        shapes = {_toy(shape): 256 for shape in shapes}
        long, long_positions = _toy(_LONG), 512
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mlpmem-bench-") as folder:
        for shape, positions in shapes.items():
            speeds = _measure_speed(config, shape, positions, device, Path(folder) / shape.name)
            rows += speeds
            suffix = "" if shape.name == _HEADLINE.name else f"_{shape.name}"
            for codec in ("int8", "raw"):
                for anchor in ("forward", "body"):
                    arms = (f"{shape.name} {codec}", f"{shape.name} {anchor}")
                    found = [median_of(speeds, arm, "tokens_per_second") for arm in arms]
                    ratios[f"{codec}_over_{anchor}{suffix}"] = found[0] / found[1]
        sizes = _measure_bytes(config, long, long_positions, Path(folder) / "bytes")
        peak_of_run = _peak_of_run if config.toy else partial(in_child, _peak_of_run)
        memory = [
            row_of(f"{count} positions", "peak_memory_above_start", "B", [peak_of_run(config, long, count)])
            for count in (long_positions, _LENGTH_RATIO * long_positions)
        ]
        rows += [*sizes, *memory]
    ratios |= {f"bytes_per_token_{row.arm.replace(' ', '_')}": row.median for row in sizes}
    ratios["peak_memory_8x_over_1x"] = memory[1].median / memory[0].median
    report.publish(config.output, rows, ratios)


def _toy(shape: Shape) -> Shape:
    return dataclasses.replace(shape, num_layers=1, width=32, vocab_size=211, block_size=32)


def _measure_speed(
    config: Config, shape: Shape, positions: int, device: torch.device, root: Path
) -> list[Row]:
    """Tokens a second of the four arms, in turn."""
    base, corpus = _write_base(shape, root / "base"), _write_corpus(shape, positions, root / "corpus")
    dtype = DTYPES[resolve_dtype(config.dtype, device)]
    model = load_base(base, dtype=dtype, device=device)
    arms: dict[str, Callable[[], float]] = {
        "forward": lambda: _seconds_of_forward(
            config, corpus, device, lambda ids_BS: model(ids_BS, use_cache=False)
        ),
        "body": lambda: _seconds_of_forward(
            config, corpus, device, lambda ids_BS: model.base_model(ids_BS, use_cache=False)
        ),
    }
    for codec in ("int8", "raw"):
        arms[codec] = lambda codec=codec: _seconds_of_units(  # type: ignore[misc]
            _extraction(config, shape, base, corpus, root / "keys", codec=codec)
        )
    arms["forward"]()  # warm-up
    speeds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(config.runs):
        for arm, seconds_of in arms.items():
            gc.collect()
            speeds[arm].append(positions / seconds_of())
            _logger.info(
                "run %d of %d, %s %s: %.0f tokens/s",
                number + 1,
                config.runs,
                shape.name,
                arm,
                speeds[arm][-1],
            )
    return [
        row_of(f"{shape.name} {arm}", "tokens_per_second", "1/s", values) for arm, values in speeds.items()
    ]


@torch.no_grad()
def _seconds_of_forward(
    config: Config, corpus: Path, device: torch.device, forward: Callable[[torch.Tensor], Any]
) -> float:
    """The same windows in the same batches as the extraction's, tokens read before the clock starts."""
    split = open_corpus(corpus)
    windows = split.windows()
    batches = [
        torch.from_numpy(
            np.stack(
                [
                    split.tokens(window.context_start, window.stop)
                    for window in windows[at : at + config.batch_windows]
                ]
            )
        ).to(device)
        for at in range(0, len(windows), config.batch_windows)
    ]
    start = time.perf_counter()
    for ids_BS in batches:
        forward(ids_BS)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _extraction(
    config: Config,
    shape: Shape,
    base: Path,
    corpus: Path,
    output: Path,
    *,
    codec: Literal["int8", "raw"],
    input_codec: Literal["bf16", "int8", "none"] = "bf16",
    unit_windows: int = 4,
) -> extract_keys.Config:
    return extract_keys.Config(
        model=str(base),
        corpus=corpus,
        output=output.with_name(f"{output.name}-{codec}-{input_codec}"),
        codec=codec,
        input_codec=input_codec,
        unit_positions=unit_windows * shape.block_size,
        fit_positions=2 * shape.block_size,
        batch_windows=config.batch_windows,
        dtype=config.dtype,
        device=config.device,
    )


def _seconds_of_units(config: extract_keys.Config) -> float:
    """Run the stage anew; seconds of the units of positions, from its log."""
    shutil.rmtree(config.output, ignore_errors=True)
    extract_keys.run(config, World())
    events = [event for event in read_events(config.output / "log.jsonl") if event["event"] == "unit"]
    shutil.rmtree(config.output, ignore_errors=True)
    return sum(event["seconds"] for event in events if event["unit"] != "codec")


def _measure_bytes(config: Config, shape: Shape, positions: int, root: Path) -> list[Row]:
    """Bytes a position on disk, by the codecs of keys and inputs."""
    base, corpus = _write_base(shape, root / "base"), _write_corpus(shape, positions, root / "corpus")
    rows = []
    for codec, input_codec in (("int8", "none"), ("int8", "int8"), ("int8", "bf16"), ("raw", "none")):
        extraction = _extraction(
            config,
            shape,
            base,
            corpus,
            root / "keys",
            codec=codec,  # type: ignore[arg-type]
            input_codec=input_codec,  # type: ignore[arg-type]
            unit_windows=math.ceil(positions / shape.block_size),
        )
        extract_keys.run(extraction, World())
        used = sum(512 * path.stat().st_blocks for path in extraction.output.rglob("*"))
        arm = codec if input_codec == "none" else f"{codec} and {input_codec} inputs"
        rows.append(row_of(arm, "bytes_per_token", "B", [used / positions]))
        shutil.rmtree(extraction.output)
    return rows


def _peak_of_run(config: Config, shape: Shape, positions: int) -> int:
    """In a child: peak memory of a whole run above the process's start."""
    use_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="mlpmem-bench-") as folder:
        root = Path(folder)
        base, warm, corpus = root / "base", root / "warm", root / "corpus"
        _write_base(shape, base)
        _write_corpus(shape, 4 * shape.block_size, warm)
        _write_corpus(shape, positions, corpus)
        for number, path in enumerate((warm, corpus)):
            # Small units: within the first few the allocator is still growing, and the short corpus must
            # reach its plateau.
            extraction = _extraction(
                config, shape, base, path, root / f"keys{number}", codec="int8", unit_windows=8
            )
            if path == warm:
                extract_keys.run(extraction, World())
        return peak_bytes_above_start(lambda: extract_keys.run(extraction, World()))


def _write_base(shape: Shape, path: Path) -> Path:
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.block_size,
            n_embd=shape.width,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(path)
    return path


def _write_corpus(shape: Shape, positions: int, root: Path) -> Path:
    return write_made_up_corpus(
        root, positions=positions, vocab_size=shape.vocab_size, block_size=shape.block_size
    )

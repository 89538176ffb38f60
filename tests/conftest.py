"""Small real parts that many tests read: text, a corpus, a random GPT-2 base, its keys. Made once a session;
read-only."""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# A shell that starts the tests in the background has them ignore it, and what they start would too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples in every run, however slow the machine is; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# transformers copies the code of the exports that it loads there, and reads the variable at its import: not
# the user's, and the same for all tests of a process, which remembers where the package of the copies lies.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="code-of-exports-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM  # noqa: E402

from mlpmem_ds.core.files import publish_json, read_sealed_json  # noqa: E402
from mlpmem_ds.core.world import World  # noqa: E402
from mlpmem_ds.engines import device_peak, plotting  # noqa: E402
from mlpmem_ds.stages.corpus import prepare_corpus  # noqa: E402
from mlpmem_ds.stages.keys import extract_keys  # noqa: E402

VOCAB_SIZE = 300
BLOCK_SIZE = 32
_SECONDS_OF_A_RANK = 60.0


# The files that take longest, the first ones first: workers that begin with them end together.
_LONGEST = (
    "launch/test_demo.py",
    "benchmarks/quality/test_quality.py",
    "stages/training/test_train.py",
    "stages/training/test_train_faults.py",
    "stages/targets/test_same_bytes.py",
    "engines/deepspeed/test_zero_state.py",
    "stages/test_kill.py",
    "engines/collectives/test_torch_group.py",
    "stages/training/test_base_start.py",
    "stages/base/test_train_base.py",
    "stages/training/test_launchers.py",
    "stages/evaluation/test_evaluate.py",
    "stages/targets/test_calls.py",
    "tools/test_launchers.py",
    "tools/test_gpu_check.py",
    "test_rules.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    assert all(path.is_file() for path in places), _LONGEST
    items.sort(key=lambda item: places.get(item.path, len(places)))


def write_text(root: Path, *, num_files: int = 24, seed: int = 0) -> Path:
    """A directory of small packages of repetitive source-like text."""
    generator = random.Random(seed)
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "return",
        "value",
        "index",
        "for",
        "in",
        "range",
        "import",
        "é",
    ]
    for number in range(num_files):
        path = root / f"package{number % 6}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            " ".join(generator.choices(words, k=generator.randint(3, 9)))
            for _ in range(generator.randint(8, 24))
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session", autouse=True)
def _no_flush_to_disk() -> Iterator[None]:
    """Half of a small stage's time is fsync, which a test that kills processes, not machines, cannot tell
    from none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


_DRAWING = ("mlpmem_ds.stages.report.plots.save_png", "mlpmem_ds.stages.training.curves.save_png")


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """The picture of a small training or evaluation takes as long as the rest of it, and the peak of the
    processor a tenth; the first is drawn where the fixture `drawn_pictures` asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _DRAWING:
            patch.setattr(name, lambda figure, path, **_: path.write_bytes(b"\x89PNG"))
        patch.setitem(device_peak._SIZES, "cpu", 64)
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _DRAWING:
        monkeypatch.setattr(name, plotting.save_png)


@pytest.fixture
def set_free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give every disk so many free bytes, as often as it is called."""
    usage = shutil.disk_usage(Path.cwd())

    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=num_bytes))

    return set_free


@pytest.fixture(scope="module", autouse=True)
def _environment_as_before() -> Iterator[None]:
    """A training in this process leaves its rank in the environment and in what is logged, where the next
    file's stages would find it."""
    before, library = dict(os.environ), logging.getLogger("mlpmem_ds")
    level = library.level
    yield
    library.setLevel(level)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def process_group() -> None:
    """A group of one rank in this process. DeepSpeed keeps hold of a process's first group, so it is never
    left."""
    from mlpmem_ds.engines.deepspeed.process_group import set_up_distributed

    set_up_distributed(World())


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def corpus_dir(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with all four splits; vocabulary 300, blocks of 32, stride 16."""
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    config = prepare_corpus.Config(
        input=(str(text_dir),),
        tokenizer=f"train:{VOCAB_SIZE}",
        output=output,
        block_size=BLOCK_SIZE,
        stride=BLOCK_SIZE // 2,
        tuning_fraction=0.15,
        test_fraction=0.15,
        heldout_fraction=0.2,
        seed=3,
    )
    prepare_corpus.run(config, World())
    return output


def with_begin_tokens(corpus_dir: Path, output: Path, begin: tuple[int, ...]) -> Path:
    """The same corpus, whose windows are to be read with these tokens before them."""
    return _with_tokenizer(corpus_dir, output, begin_of_document_ids=list(begin))


def with_vocabulary(corpus_dir: Path, output: Path, sha256: str) -> Path:
    """The same corpus, which says that its ids are of this vocabulary."""
    return _with_tokenizer(corpus_dir, output, vocabulary_sha256=sha256)


def _with_tokenizer(corpus_dir: Path, output: Path, **changes: Any) -> Path:
    shutil.copytree(corpus_dir, output)
    manifest = read_sealed_json(output / "manifest.json")
    manifest["tokenizer"] |= changes
    publish_json(output / "manifest.json", manifest, seal=True)
    return output


def with_two_ids_swapped(tokenizer: Path, output: Path) -> Path:
    """The same tokenizer.json, in which two tokens have each other's id."""
    rules = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = rules["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    output.write_text(json.dumps(rules), encoding="utf-8")
    return output


def save_base(path: Path, *, seed: int = 0, num_layers: int = 2) -> Path:
    """A random GPT-2 of width 16 for the toy vocabulary."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=64,
        n_embd=16,
        n_layer=num_layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def save_narrow_base(path: Path) -> Path:
    """A random OPT for the toy vocabulary whose head reads 8 of its layers' 16 numbers."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        hidden_size=16,
        word_embed_proj_dim=8,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        init_std=0.3,
    )
    OPTForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def keys_dir(corpus_dir: Path, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 keys of the training split, units of 256 positions, with memory inputs."""
    output = tmp_path_factory.mktemp("keys") / "keys"
    extract_keys.run(
        extract_keys.Config(model=str(base_dir), corpus=corpus_dir, output=output, unit_positions=256),
        World(),
    )
    return output


@pytest.fixture(scope="session")
def forked_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with `python`, `torchrun` and `deepspeed` that start at once; see warm_server.py."""
    path = tmp_path_factory.mktemp("commands")
    file, globals_of_file = str(Path(__file__).with_name("warm_server.py")), {"DIRECTORY": path}
    (server,) = _forked((runpy.run_path, file, globals_of_file, "__main__"))
    while not (path / "ready").exists():
        assert server.is_alive(), "its stderr says why"
        time.sleep(0.05)
    yield path
    server.kill()
    server.join()


@pytest.fixture(scope="session")
def killed_runs() -> Callable[..., int]:
    """killed_runs(run, config, ranks=2, kills=20, seed=0, check=None) -> kills that hit a running process.

    Starts `ranks` processes that each call `run(config, World(...))`, kills one or all of them (-9) at a
    random moment of an undisturbed run's duration, lets the others end, starts again, until `kills` kills
    have hit. A run that completes on the way is given to `check(output)`, removed, and begun anew, so that
    kills fall on every part of it. At last one start without a kill completes `config.output`; the
    undisturbed run stays in `<output>-undisturbed`.

    `run` is a function that can be imported (a stage's), `config` a dataclass with a field `output`.
    """
    return _killed_runs


def _killed_runs(
    run: Callable[[Any, World], Any],
    config: Any,
    *,
    ranks: int = 2,
    kills: int = 20,
    seed: int = 0,
    check: Callable[[Path], None] | None = None,
) -> int:
    generator = random.Random(seed)
    output: Path = config.output
    undisturbed = dataclasses.replace(config, output=output.with_name(f"{output.name}-undisturbed"))
    _join(_start_ranks(run, undisturbed, ranks), run)  # the first start of a process server takes seconds
    shutil.rmtree(undisturbed.output)
    start = time.monotonic()
    _join(_start_ranks(run, undisturbed, ranks), run)
    duration = time.monotonic() - start
    hits = 0
    for _ in range(10 * kills):
        processes = _start_ranks(run, config, ranks)
        victims = processes if generator.random() < 0.5 else [generator.choice(processes)]
        time.sleep(generator.uniform(0, duration))
        for victim in victims:
            victim.kill()
        _join(processes, run)
        was_hit = any(victim.exitcode == -signal.SIGKILL for victim in victims)
        hits += was_hit
        if hits == kills:
            break
        if (output / "manifest.json").is_file():
            if check is not None:
                check(output)
            shutil.rmtree(output)
    assert hits == kills, f"{hits} of {10 * kills} kills hit a running process"
    _join(_start_ranks(run, config, ranks), run)
    return hits


_warm_server: int | None = None


def _start_ranks(run: Callable[[Any, World], Any], config: Any, ranks: int) -> list[Any]:
    worlds = [World(rank=rank, size=ranks, local_rank=rank) for rank in range(ranks)]
    return _forked(*((run, config, world) for world in worlds))


def _forked(*calls: tuple[Any, ...]) -> list[Any]:
    """A process for each (function, argument, …), forked from a server that has imported everything.

    One server for a session, which finds warm_start.py as its own search path says. A server that another
    has started (a benchmark's in_child), with less imported, ends first: each fork would take seconds.
    """
    global _warm_server
    server: Any = forkserver._forkserver
    if server._forkserver_pid != _warm_server:
        server._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "warm_start"])
    processes = [context.Process(target=run, args=arguments) for run, *arguments in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        for process in processes:
            process.start()
    _warm_server = server._forkserver_pid
    return processes


def _join(processes: list[Any], run: Callable[[Any, World], Any]) -> None:
    deadline = time.monotonic() + _SECONDS_OF_A_RANK
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} ranks of {run.__module__} did not end in {_SECONDS_OF_A_RANK} s"
    failed = [process.exitcode for process in processes if process.exitcode not in (0, -signal.SIGKILL)]
    assert not failed, f"ranks of {run.__module__} ended with {failed}: see their messages above"

"""Arms that mix the base with a kNN search of stored keys: `--keys`, `--index`, `--targets`.

Each check refuses a pair that does not belong together, with the names of both and the remedy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.host import host_bytes
from mlpmem_ds.core.run_description import resolved_at_start
from mlpmem_ds.core.stage_directory import StageDirectory
from mlpmem_ds.engines.devices import free_host_bytes, memory_bytes
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.index_directory import IndexDirectory
from mlpmem_ds.formats.keys import Keys, open_keys
from mlpmem_ds.maths.exact_limit import max_keys_for_exact
from mlpmem_ds.maths.weighting import Weighting
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.evaluation.arms.arm import Arm, Part, Price, Scores, sum_of_logs
from mlpmem_ds.stages.evaluation.arms.base import Context, ModelArm
from mlpmem_ds.stages.evaluation.arms.datastore import Datastore, read_datastore
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.forward_pass import ForwardPass, Scan
from mlpmem_ds.stages.retrieval.knn_scorer import NEIGHBOUR_DIVISORS, TEMPERATURE_FACTORS, KnnScorer
from mlpmem_ds.stages.retrieval.neighbour_search import NeighbourSearch, open_search
from mlpmem_ds.stages.retrieval.verification import verify_index, verify_keys

_logger = logging.getLogger(__name__)
KNN_EXACT, KNN_IVFPQ = "base+knn_exact", "base+knn_ivfpq"
_DEFAULT_K = 256
_SHARES = (0.25, 0.5, 1.0)  # of the keys, at which speed is measured


@dataclass(frozen=True, kw_only=True)
class Vote:
    """How the nearest keys of a datastore vote for the next token, checked to fit base and text."""

    keys: Keys
    k: int
    weighting: Weighting
    point: CapturePoint
    """where in the base a query is read"""


@dataclass(frozen=True, kw_only=True, eq=False)
class KnnArm(Arm):
    """The base mixed with the vote of the nearest keys."""

    name: str
    description: str
    part: Part
    vote: Vote
    open_search: Callable[[int | None], NeighbourSearch]
    """of the first keys, so many, or of all"""
    index: IndexDirectory | None
    """that is searched; None where all keys are"""
    scorer: KnnScorer
    forward_pass: ForwardPass
    price: Price
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    resolved: Mapping[str, Any]
    reads: tuple[CapturePoint, ...]
    choices: tuple[Mapping[str, float], ...]
    trained_on: tuple[tuple[str, str], ...]
    sizes: tuple[int, ...]
    gives_zeros: bool = True

    def verify(self, stage: StageDirectory) -> None:
        verify_keys(stage, self.vote.keys)
        if self.index is not None:
            verify_index(stage, self.index)

    def load(self) -> None:
        self.scorer.prepare()

    def score(self, scan: Scan) -> Scores:
        neighbours = self.scorer.neighbours(scan.states[self.vote.point].numpy())
        return Scores(
            values=self.scorer.log_probabilities(neighbours, scan.values_n),
            guesses=self.scorer.log_probabilities(neighbours, scan.top_ids_n),
        )

    def at_size(self, size: int) -> KnnArm:
        if size == self.vote.keys.num_positions:
            return self
        return replace(self, scorer=replace(self.scorer, search=self.open_search(size)))


def open_arms(config: Config, context: Context) -> list[KnnArm]:
    """The search of all keys, and that of the index. See `base.Opener`."""
    datastore = read_datastore(config.keys, config.index, config.targets)
    if datastore is None:
        return []
    base = context.base
    vote = _open_vote(datastore, context, k=config.k, temperature=config.temperature)
    arms = []
    if is_exact := _is_exact(config, datastore, context):
        arms.append(_open_exact(vote, base))
    if datastore.index is not None:
        arms.append(arm := _open_indexed(vote, datastore.index, base, nprobe=config.nprobe))
        measures_fewer = config.speed_positions is not None and arm.sizes[0] < vote.keys.num_positions
        _require_memory(datastore.index, vote.keys, context.ranks_of_host, measures_fewer=measures_fewer)
    return [replace(arm, resolved={**arm.resolved, "exact": is_exact}) for arm in arms]


def layers_paths(config: Config) -> list[str | None]:
    """Where the base's layers are, as the keys say; None: extraction found them."""
    if config.keys is None or not (config.keys / "manifest.json").is_file():
        return []
    return [open_keys(config.keys).manifest.layers_path]


def _open_vote(datastore: Datastore, context: Context, *, k: int | None, temperature: float | None) -> Vote:
    """The weighting and k that the flags or else the targets say."""
    keys, targets = datastore.keys, datastore.targets
    _check_belongs(keys, context.base, context.corpus)
    if temperature is not None:
        kind = "softmax" if targets is None else targets.weighting.kind
        weighting = Weighting(kind=kind, temperature=temperature)
    elif targets is not None:
        weighting = targets.weighting
    else:
        raise UserError(
            "the kNN arms need a temperature: give --targets, whose temperature they take, or --temperature"
        )
    k = k or (targets.manifest.k if targets else _DEFAULT_K)
    if k > keys.num_positions:
        raise UserError(
            f"{k:,} neighbours are more than the {keys.num_positions:,} of --keys {keys.root}: give a"
            " smaller --k"
        )
    point = CapturePoint(layer=keys.manifest.key_layer, point=keys.manifest.key_point)
    return Vote(keys=keys, k=k, weighting=weighting, point=point)


def _open_exact(vote: Vote, base: ModelArm) -> KnnArm:
    def search(num_keys: int | None) -> NeighbourSearch:
        return open_search(
            vote.keys, how="exact", num_keys=num_keys, device=base.source.device, is_verified=True
        )

    how = "with every stored key"
    return _open_arm(KNN_EXACT, "reference", vote, search, base, index=None, how=how, settings={})


def _open_indexed(vote: Vote, index: IndexDirectory, base: ModelArm, *, nprobe: int) -> KnnArm:
    def search(num_keys: int | None) -> NeighbourSearch:
        return open_search(
            vote.keys,
            index,
            how="index",
            nprobe=nprobe,
            num_keys=num_keys,
            device=base.source.device,
            is_verified=True,
        )

    how = (
        f"with the keys of {nprobe} lists of an IVF-PQ index; the distances are then computed from the stored"
        " keys, since PQ's own would do worse"
    )
    settings = {"nprobe": nprobe, "index_factory": index.factory}
    arm = _open_arm(KNN_IVFPQ, "other", vote, search, base, index=index, how=how, settings=settings)
    return replace(arm, resolved={**arm.resolved, "nprobe": nprobe})


def _require_memory(index: IndexDirectory, keys: Keys, num_ranks: int, *, measures_fewer: bool) -> None:
    """Refuse an index that this host cannot hold in each of its ranks and, where speed is measured at fewer
    keys, once more in the one that does that. What is free is compared with one copy: other ranks may have
    theirs already.

    Raises:
        UserError: with the remedy.
    """
    from mlpmem_ds.stages.retrieval.index_search import bytes_in_memory  # loads faiss, as the search does

    each, copies = bytes_in_memory(index, keys.dim), num_ranks + measures_fewer
    if each <= (free := free_host_bytes()) and copies * each <= (whole := host_bytes()):
        return
    room = f"{free / 1e9:.1f} GB are free here" if each > free else f"this host has {whole / 1e9:.1f} GB"
    several = f" ({copies} times here{', with that of --speed-positions' if measures_fewer else ''})"
    raise UserError(
        f"--index {index.root} is {each / 1e9:.1f} GB, which each rank holds in memory"
        f"{several if copies > 1 else ''}, and {room}: leave --index out,"
        f"{' give --speed-positions none,' if measures_fewer else ''}"
        f"{' start fewer ranks on a host,' if num_ranks > 1 else ''} or take a host with more memory"
    )


def _open_arm(
    name: str,
    part: Part,
    vote: Vote,
    search: Callable[[int | None], NeighbourSearch],
    base: ModelArm,
    *,
    index: IndexDirectory | None,
    how: str,
    settings: Mapping[str, Any],
) -> KnnArm:
    keys = vote.keys
    scorer = KnnScorer(keys=keys, search=search(None), k=vote.k, weighting=vote.weighting)
    return KnnArm(
        name=name,
        description=(
            "the base mixed with a kNN search, in which the tokens that followed the most similar stored"
            f" contexts vote for the next one: each context is compared {how}"
        ),
        part=part,
        vote=vote,
        open_search=search,
        index=index,
        scorer=scorer,
        forward_pass=base.forward_pass,
        price=base.price.plus(
            bytes=scorer.num_bytes,
            seconds=sum_of_logs([keys.root, *([] if index is None else [index.root])]),
            tokens=int(keys.num_positions),
        ),
        inputs={"keys": keys.sha256} | ({} if index is None else {"index": index.sha256}),
        settings={
            "k": vote.k,
            "weighting": vote.weighting.kind,
            "temperature": vote.weighting.temperature,
            "temperature_factors": list(TEMPERATURE_FACTORS),
            "neighbour_divisors": list(NEIGHBOUR_DIVISORS),
            **settings,
        },
        resolved={
            "k": vote.k,
            "temperature": vote.weighting.temperature,
            "targets": vote.weighting.kind,
        },
        reads=(vote.point,),
        choices=tuple(
            {"neighbours": count, "temperature": weighting.temperature} for count, weighting in scorer.choices
        ),
        trained_on=((keys.corpus_sha256, keys.manifest.split),),
        sizes=_sizes(keys.num_positions, vote.k),
    )


def _sizes(num_keys: int, k: int) -> tuple[int, ...]:
    return tuple(sorted({max(min(k, num_keys), int(num_keys * share)) for share in _SHARES}))


def _check_belongs(keys: Keys, base: ModelArm, corpus: CorpusSplit) -> None:
    if keys.model_sha256 != base.sha256:
        remedy = "give that base, or extract keys with this one"
        if keys.base_sha256 == base.sha256:
            remedy = "its queries would need that model too: leave --keys out to compare without the kNN arms"
        raise UserError(
            f"--keys {keys.root} were extracted from another base ({keys.model_sha256[:12]}…) than --model "
            f"{base.path} ({base.sha256[:12]}…): {remedy}"
        )
    if keys.manifest.vocab_size != corpus.vocab_size:
        raise UserError(
            f"--keys {keys.root} have a vocabulary of {keys.manifest.vocab_size}, the corpus one of"
            f" {corpus.vocab_size}: prepare the corpus with the same tokenizer"
        )
    begin = keys.manifest.begin_of_window_ids
    if begin is not None and begin != corpus.begin_of_document_ids:
        raise UserError(
            f"--keys {keys.root} are of windows that begin with the tokens {list(begin)}, those of the"
            f" corpus begin with {list(corpus.begin_of_document_ids)}: prepare the corpus with the"
            " same tokenizer"
        )
    dtype = base.source.dtype_name
    if keys.manifest.dtype not in (None, dtype):
        _logger.warning(
            "the keys were extracted in %s and the queries are computed in %s: --dtype makes them equal",
            keys.manifest.dtype,
            dtype,
        )


def _is_exact(config: Config, datastore: Datastore, context: Context) -> bool:
    """Whether all keys are searched too: as the flag says, as the report was begun, else where that takes
    little time."""
    if config.exact is not None:
        return config.exact
    begun = resolved_at_start(config.output, "exact")
    return begun if isinstance(begun, bool) else _takes_little_time(datastore, context)


def _takes_little_time(datastore: Datastore, context: Context) -> bool:
    """Whether so many positions are compared with all keys by default.

    Raises:
        UserError: it takes long, and there is no index to search instead.
    """
    keys, device, num_queries = datastore.keys, context.base.source.device, context.num_positions
    num_keys, key_bytes = keys.num_positions, keys.bytes_of("keys") // keys.num_positions
    # write_targets compares so many keys with themselves before it would rather have an index.
    limit = max_keys_for_exact(device.type, key_bytes, memory_bytes(device))
    exact = num_keys * num_queries <= limit**2
    pairs = f"{num_queries:,} positions times {num_keys:,} keys"
    if not exact and datastore.index is None:
        raise UserError(
            f"{pairs} are long work for exact search: give --index, or --exact to search all keys"
            " nevertheless"
        )
    if exact:
        _logger.info("%s: all keys are searched too (base+knn_exact); --no-exact leaves that out", pairs)
    else:
        _logger.info(
            "%s are long work: without base+knn_exact; --exact searches all keys nevertheless", pairs
        )
    return exact

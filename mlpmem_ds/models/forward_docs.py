"""What the forward of the joint model takes and gives, for its docstring: it is longer than the forward.

This file travels with exported models as remote code: it imports the standard library only.

Shapes: B sequences, S tokens, K kept positions, D width of the base, V vocabulary.
"""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def documented(text: str) -> Callable[[F], F]:
    """A decorator that gives a function its docstring."""

    def give(function: F) -> F:
        function.__doc__ = text
        return function

    return give


FORWARD = r"""One forward of the base, and of the memory on the kept positions (on all for a history).

Args:
    input_ids (`torch.LongTensor` of shape `[B, S]`, *optional*): the new tokens.
    attention_mask (`torch.Tensor` of shape `[B, length]`, *optional*): 0 for padding, of the tokens
        in the cache too; on either side. What else the base takes is handed to it.
    position_ids (`torch.LongTensor` of shape `[B, S]`, *optional*): for a base that takes them.
    past_key_values (`Cache`, *optional*): of the base, as the last forward returned it.
    inputs_embeds (`torch.FloatTensor` of shape `[B, S, D]`, *optional*): in the place of input_ids,
        not for a gate with a history.
    labels (`torch.LongTensor` of shape `[B, S]`, *optional*): aligned with `input_ids`, shifted here;
        -100 is ignored.
    use_cache (`bool`, *optional*): whether to return a cache.
    logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): of how many last positions
        logits are given (0: all), or of which.
    return_dict (`bool`, *optional*): a tuple where false.
    token_mask (`torch.Tensor` of shape `[B, S]`, *optional*): false for padding among the new tokens;
        needed where `attention_mask` is not `[B, length]`, for a gate with a history and memories
        with a window.
    kwargs: other arguments of the base's forward, such as `output_hidden_states`.

Returns:
    `CausalLMOutputWithPast`: `loss` (of shape `[]`, with labels: mean cross entropy in nats),
    `logits` (`[B, K, V]`, float32: the mixture's log-probabilities and in each row the log-sum-exp of
    the base's logits; these themselves, in their dtype, where lmbda is 0), `past_key_values`,
    `hidden_states` and `attentions` (the base's).

Raises:
    ValueError: what a gate or a window needs was not given, or other models wrote the cache.

Example:
    >>> from mlpmem_ds.models.hf import MemoryAugmentedLM
    >>> from transformers import AutoTokenizer
    >>> model = MemoryAugmentedLM.from_pretrained("run/export")
    >>> tokenizer = AutoTokenizer.from_pretrained("run/export")
    >>> words = tokenizer("the quick brown fox", return_tensors="pt")
    >>> output = model(**words, labels=words.input_ids)
    >>> list(output.logits.shape) == [1, words.input_ids.shape[1], model.config.vocab_size]
    True
    >>> model.lmbda = 0.0  # the base alone
    >>> bool((model(**words).logits == model.base(**words).logits).all())
    True
"""

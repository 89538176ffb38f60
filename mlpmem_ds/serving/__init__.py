"""Serving: the joint model inside engines of others, which load these files; no command of ours does.

Read in this order; those named after an engine are the only ones that import it, when it has loaded them:
    row_layout       which hidden states stand next to each other in a row that an engine samples from
    slot_states      states of past tokens, kept by the slots of an engine's cache
    kept_logits      logits of the rows that were sampled from last, for a history
    row_past         what a row carries of them: a gate's history, the states of a window
    state_hooks      states of inner layers, read by hooks
    request_weights  λ of single requests: read, followed through a batch, handed to the model
    vllm_plugin      what vLLM calls first, in each of its processes (entry point `vllm.general_plugins`)
    vllm_model       any base of vLLM with its memories
    vllm_slots       a layer more in vLLM's cache, for what is kept of past tokens
    vllm_requests    λ a request: a logits processor of vLLM that changes no logits
    transformers_serve  the command `transformers serve`, which then knows the joint model
"""

"""Models: the memory that is trained, the frozen base that it reads, and the two joined.

Read in this order; files marked * are copied into every export and import nothing of ours but each other:
    memory_config*     the memory's shape, and named sizes: plain values
    logit_transform*   a scale and a soft cap of logits
    shared_head*       the base's output head, for a memory that has none of its own
    memory*            the memory: a stack of residual MLP blocks and its head
    structure*         a base's layers, MLPs and output head, found by structure
    capture_point*     where a hidden state is read
    base_loading       a base is loaded, frozen
    backbone*          capturing a base's hidden states, and what it does after its head
    mixture*           the mixture of base and memories; gates, which give the memories' weights
    gate_features*     what a learned gate reads: confidences, and the history of past tokens
    gates*             gates that learned the weights, and the register of all gates
    hf_config*         the joint model's config.json
    joint_parts*       what it is put together from: base, memories and their inputs, checked
    carried_layers*    what a joint model remembers of each sequence, carried by the base's cache:
    history_cache*     a gate its history,
    window_cache*      a memory with a window the states of the positions before
    joint_step*        from one forward of the base to the mixture, with or without the memories
    joint_forward*     a forward of the joint model: base, memories, and what the cache carries
    forward_docs*      what that forward takes and gives, in words
    kept_card*         the model card of a loaded export, when it is saved again
    hf*                the joint model: its forward, generation, saving and loading
    pretrained_memory* a trained memory that waits for its base
    generation_settings where generation stops, and the rows that it never takes
    left_padding       prompts of several lengths in one batch, and the models that must not be padded
    quantized*         a memory with int8 matrices, for decoding
    quantized_base*    a base of 4 or 8 bits, whose memories and gate stay as they are
    mixture_on_device  the mixture of logits by Triton
    mixture_scores     the mixture of log-probabilities kept in NumPy, for report and validation
    past_states        states of a position and of those before it in stored text, for a memory with a window
    final_norm         training only: the norm before a base's head, found, and its kind
    base_end           training only: that norm and the head, for objectives that need p_base
    gate_fit           training only: a gate's net, and the best fixed weights, fitted to stored scores
    objective          training only: the memory with the loss in its head
    activations        training only: activations that are recomputed or compiled
    shape              how large a base is, without its weights, for `plan`
"""

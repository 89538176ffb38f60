"""`train_baseline`: other ways to spend a memory's parameters, steps or time on the same text.

- `train_baseline`: the command: the base trained on, LoRA, or a bigger model; `config`: its flags
- `matched_size`: the parameters of the memory that is compared with
- `low_rank`: the kind `lora`; `bigger_model`: the kind `bigger`
"""

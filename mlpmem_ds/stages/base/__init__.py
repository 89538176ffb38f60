"""`train_base`: a small base from scratch, or an existing one trained on; by the trainer of stages/training.

- `train_base`: the command: checks, builds the parts, starts them; `config`: its flags
- `model`: the model that is trained, and how it is written
- `batches`: the train split cut into sequences; `objective`: their cross entropy
- `validation`: the perplexity on the tuning split
"""

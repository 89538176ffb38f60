"""`train_base`: a small base from scratch; and the parts that `train_baseline` (stages/baseline) shares.

- `train_base`: the command: makes the model, starts its training; `config`: its flags
- `options`: the flags that both trainings of language models share
- `decoder_training`: a language model learns a corpus, by the trainer of stages/training
- `model`: the model that is trained, and how it is written
- `batches`: the train split cut into sequences; `objective`: their cross entropy
- `validation`: the perplexity on the tuning split
"""

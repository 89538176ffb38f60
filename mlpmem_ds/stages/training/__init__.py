"""`train`: a memory under DeepSpeed; and the trainer that the trainings of stages/base share with it.

- `train`: the command: checks, builds the parts, starts them; `config`: its flags
- `options`: the flags that both trainings share; `schedule`, `defaults`: the learning rate, and its default
- `inputs`, `memory_shape`, `initial_memory`, `frozen_base`: what is given, opened, checked
- `base_start`: what a memory takes over from its base; `base_files`: out of the base's files;
  `lent_head`: its head, for a memory that has none of its own
- `objectives`: what may be minimized, by name, and how one is added; `imitation`: the first,
  `joined`: with the base's whole distribution
- `automatic`: which of them `--objective auto` takes; `recipes`: sets of flags by name
- `streamed_batches`: batches of `--loader webdataset`
- `parts`: what a training is put together from: objective, batches, validator
- `training`: one training from its start to its result; `loop`: the steps one after another
- `validation`: what validations found, the best weights; `memory_validation`: those of a memory
- `known_text`: whether the base was itself trained on the text
- `metrics`, `curves`: metrics.jsonl, TensorBoard, W&B, one picture
- `intervals`: how many steps between two checkpoints cost least time
"""

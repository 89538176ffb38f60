"""DeepSpeed: the ranks' group, its configuration file, the ZeRO engine, and a base cut over the ranks.

- `library`: the one file that imports DeepSpeed, which it does inside functions
- `process_group`: the ranks find each other
- `config`: DeepSpeed's JSON file, read strictly, our numbers put in
- `engine`: a model under ZeRO: steps, checkpoints, whole weights
- `zero_state`: weights and moments out of and into ZeRO's shards
- `saved_shards`: slices of both out of a checkpoint's files
- `weights`: whole weights out of a checkpoint's files, without an engine
- `sharded_base`: a frozen base whose weights are cut over the ranks
"""

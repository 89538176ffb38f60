"""The stages: a folder for each command, with its flags in `config.py` and a function `run(config, world)`.

In the order of the pipeline:

- `fetching`: fetch_base
- `corpus`, `base`, `keys`, `index`, `targets`, `training`: prepare_corpus, train_base, extract_keys,
  build_index, write_targets, train
- `baseline`: train_baseline, what a memory is compared with
- `gating`: fit_gate
- `evaluation`, `report`, `viewing`: evaluate, what it writes for people, view_report
- `conversion`, `generation`, `questions`, `harness`: convert_checkpoint, generate, answer_questions,
  run_lm_eval
- `exchange`, `planning`, `inspection`, `mirroring`: import_datastore and export_datastore, plan, inspect_run,
  mirror
- `retrieval`: neighbour search, for targets, audits and the kNN arms
- `shared_flags.py`: flags that several commands have; `stage_ranks.py`: how a stage's ranks are connected
"""

"""What is on disk: readers, writers and typed manifests. README.md next to this file is the specification.

In the order of the pipeline:
- `input_files.py`, `input_names.py`: the files of the inputs; `omissions.py`: what was left out, and why
- `documents.py`, `document_readers.py`: text from files of many kinds; `records.py`: a document of one
- `chats.py`: conversations of many forms, brought to one
- `file_marks.py`: what a file is by its name or first bytes; `text_encoding.py`: bytes as text;
  `streams.py`: decompression
- `json_lines.py`: JSON that users give; `json_readers.py`: its records as documents
- `tar_readers.py`, `zip_readers.py`: archives; `archive_samples.py`: their members as documents
- `table_readers.py`: Parquet and Arrow; `csv_readers.py`: CSV; `saved_datasets.py`: data sets of
  `datasets`; `arrow_library.py`: pyarrow; `installed_docs.py`: docstrings of installed packages
- `corpus.py`: token shards; `window_tokens.py`: its windows as a model reads them; `mapped_tokens.py`: its
  tokens at any positions
- `rows_by_file.py`: rows at any places of several files
- `counted_rows.py`: rows of keys ↔ positions of a corpus, where answers alone count
- `keys.py`, `mapped_keys.py`: keys, values and memory inputs
- `index_directory.py`, `index_lists.py`: an index; `lists_directory.py`: keys in the order of its lists
- `targets.py`, `target_shards.py`, `target_encoding.py`: sparse targets, from directory to sample;
  `permuted_targets.py`: those of other positions, for a control
- `past_inputs.py`: stored inputs with those of the positions before
- `training_order.py`, `training_rows.py`, `training_windows.py`, `batches.py`: which rows a training takes,
  what a row is, windows read ahead in threads, a rank's batches
- `shard_deal.py`: shards that are streamed: whose they are, what of them was read
- `fetched_base.py`: where a base is from that was read from GGUF
- `checkpoint.py`, `checkpoint_copy.py`: a training's checkpoints; `trained_models.py`: what it leaves
- `weight_shards.py`: an export's weights; `gates.py`: a fitted gate; `model_directory.py`: what our models
  say of their files
- `evaluation.py`: eval.json; `question_files.py`, `answers.py`: questions that users give, and their scores;
  `suites.py`: scores of the papers' tasks
- `reference_checkpoint.py`, `arrow_tables.py`: files of the method's authors
"""

"""What runs on a heavy library, behind functions of ours; tests/test_floors.py says who may import which.

- `devices`: the device of a rank; `attention`: which attention a base can run with on it
- `hidden_states`: a causal language model of transformers reads windows of tokens, `host_copies` brings what
  it gives to the host; `model_files` finds one, `model_kinds` says why it
  cannot be read,
  `online_inputs` computes a memory's inputs with one
- `model_cards`: what the Hub reads of a model's README.md
- `gguf`: a model from llama.cpp's file, as a Hugging Face directory
- `tokenizer`: texts → ids by the one rule of all stages; `tokenizer_loading`: where tokenizers are loaded;
  `text_backend`: where a library's tokenizer lacks the rule
- `chat_template`: conversations → ids, and which of them are answers
- `minhash`: texts → signatures of which nearly equal texts have nearly equal ones
- `faiss`: the inverted-file index; `coarse_quantizers`: how its near lists are found; `faiss_library`: which
  faiss there is, and what it does on a GPU;
  `code_words`: those of its product quantizer, trained by all ranks
- `deepspeed/`: the ZeRO engine of the trainings
- `checkpoints`: saved so that a kill at any moment leaves the last one
- `processes`: torch.distributed: values exchanged, requests to stop
- `collectives/`: what ranks that were launched together exchange: torch.distributed, mpi4py, or files
- `webdataset_stream`: shards streamed from paths, commands and URLs
- `device_feed`: batches copied to the device ahead of their steps
- `device_peak`: FLOP/s of a device
- `passage_index`: passages found by their words, with bm25s
- `adapters`: low-rank matrices next to a model's layers, with peft
- `terminal`: one screen that is drawn anew, with rich
- `lm_eval`, `suite_tasks`, `plotting`: the evaluation harness, and its tasks one by one; matplotlib
- `finite_scores`: what a model says of answers is refused where it is no number
"""

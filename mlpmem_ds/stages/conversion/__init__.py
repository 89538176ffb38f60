"""`convert_checkpoint`: a trained memory and its base → one Hugging Face directory, verified.

Read in this order:
- `config.py`: the flags
- `convert_checkpoint.py`: `run`: inputs → files → verification → the directory appears whole
- `identity.py`: whether an export that is there is the one that the flags ask for
- `inputs.py`: finds and checks all that an export is made from:
- `training_inputs.py`: the base of a memory, as its keys name it
- `export_tokenizer.py`: the tokenizer, which must be that of the training
- `lambda_choice.py`: the weight of a memory, and how it was chosen
- `gate_inputs.py`: a fitted gate, and its memories in order
- `joining.py`: the joint model of a loaded base and these memories; `generate` makes it here too
- `thresholds.py`: what a threshold does without a gate, in a warning
- `weights.py`: weights of a checkpoint of a training that has not finished
- `import_reference.py`: a memory that the method's authors published
- `check.py`: the written model is loaded again and compared with its parts
- `model_card.py`: README.md of the export
"""

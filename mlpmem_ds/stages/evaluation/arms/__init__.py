"""The arms of an evaluation: ways to predict the next token, one file a kind. Read in this order:

- `arm.py`: the protocol `Arm`, with the price and the scores that every arm gives
- `model.py`: a language model alone (`--control NAME=DIR`)
- `base.py`: the base alone, whose pass serves the arms that are mixed with it (`--model`)
- `memory.py`: base and memory (`--memory`, `--control base+NAME=DIR`)
- `datastore.py`: keys, index and targets, opened
- `knn.py`: base and a search of the stored keys (`--keys`, `--index`, `--targets`)
- `controls.py`: what `--control` names, as arms of these kinds

To add a kind: a file here, a line in `open_arms` (../inputs.py), a flag in ../config.py, and its test.
"""

"""The arms of an evaluation: ways to predict the next token, one file a kind. Read in this order:

- `arm.py`: the protocol `Arm`, with the price and the scores that every arm gives
- `base.py`: the base alone (`--model`), whose pass serves the arms that are mixed with it
- `memory.py`: base and memory (`--memory`, `--control base+NAME=DIR`)
- `mixed.py`: memories (or a second model) by gates, memories as a bank (`--gate`, several `--memory`)
- `states.py`: hidden states, for gates that read them; not reported
- `knn.py`: base and a search of the stored keys; `datastore.py`: keys, index and targets, opened
- `ensemble.py`: base and a second language model (`--ensemble NAME=DIR`)
- `model.py`: a language model alone (`--control NAME=DIR`)
- `controls.py`: which controls are memories and which are models
- `training_records.py`: what a language model of ours was trained on

To add a kind: a file here with its `open_arms`, its line above, one in `OPENERS` (../inputs.py), a flag
(../config.py), and a test; CONTRIBUTING.md has one as an example.
"""

"""`fit_scaling`: how perplexity falls with parameters and compute, for a decoder alone and with a memory.

- `config`: the flags; `fit_scaling`: trains the sizes of a preset, or reads reports; writes scaling.json
- `sizes`: the sizes of a preset as jobs of `quality`
- `points`: reports as points: parameters, compute, what each document cost
- `power_law`: the fit and its intervals
- `results`: scaling.json as records, its figure and its tables
"""

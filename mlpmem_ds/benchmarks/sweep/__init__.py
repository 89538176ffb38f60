"""Benchmark `sweep`: when does imitating the retriever win, when cross entropy, when training the base on?

- `sweep`: the flags; runs all settings, writes sweep.json and its section of the page
- `settings`: what is varied around which centre, and a setting as jobs of `quality`
- `results`: sweep.json as records, its figure and its table
"""

"""Side-by-side measurements, one module a NAME of tools/bench.py; each holds its Config, its arms and
run(config, world)."""

"""One file per stage of the pipeline: a frozen Config and run(config, world)."""

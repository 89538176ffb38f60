"""The stages of the pipeline, a folder a part, a file a stage: a frozen Config and run(config, world)."""

"""The ground floor: world, blocks, configuration, files, stage directories, logs. Imports nothing else of
ours."""

"""The ground floor: ranks, units, files that appear whole, flags. Imports nothing else of the package.

Read in this order:

- `world.py`: rank and size, a value; `blocks.py`: [start, stop) arithmetic
- `config.py`: a Config's fields as flags; `flag_values.py`: a word as a flag's value; `front_end.py`:
  parse, run, exit code; `shipped.py`: ds_configs/
- `errors.py`: what users can mend; `faults.py`: what no stage has foreseen
- `streams.py`: standard streams as shells leave them; `termination.py`: SIGTERM; `caches.py`: of
  libraries, where the home directory cannot be written
- `files.py`, `array_files.py`, `directories.py`: what appears whole or not at all;
  `temporaries.py`: what they are until then; `output_files.py`: where a command may write one file
- `names.py`: names of files that are not UTF-8, and those that lead out of a directory
- `folders.py`: a thousand files a folder; `typed_json.py`: records as JSON and back;
  `record_files.py`: one in a file of its own
- `stage_directory.py`: units with records, the manifest last; `unit_maker.py`: how one is
  made; `unit_writer.py`: its files; `unit_records.py`: what the records say
- `claims.py`: which rank works at which unit; `dealing.py`: which one it takes next; `waiting.py`: for the
  others' units; `host.py`: this machine, live processes
- `once.py`: what every rank needs at the start and one computes
- `run_description.py`: identity.json and run.json; `manifest.py`, `file_lists.py`: what the next
  stage reads first; `verified_inputs.py`: the files it reads, compared once by one rank
- `objects/`: directories of ours in an object store, and the cache of what is read from there
- `hashing.py`: randomness as a pure function of its keys; `log.py`: progress and JSON lines;
  `ahead.py`: an iterator run ahead by a thread
"""

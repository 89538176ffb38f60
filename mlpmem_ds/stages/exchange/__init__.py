"""`import_datastore` and `export_datastore`: the Arrow files of the method's public code, read and written.

Read in this order:
- `config.py`: the flags of both
- `import_datastore.py`: Arrow datastores and targets → a corpus, keys and targets
- `export_datastore.py`: keys and targets → Arrow files

The tables themselves are read and written by `formats/arrow_tables.py`.
"""

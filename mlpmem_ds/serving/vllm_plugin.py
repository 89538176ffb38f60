"""What vLLM calls first, in each of its processes: the entry point `vllm.general_plugins` of this package.

After it an export is a model like any other: `vllm serve EXPORT`, with no `--trust-remote-code`.
"""

ARCHITECTURE = "MemoryAugmentedLM"  # in every export's config.json
_MODEL = f"mlpmem_ds.serving.vllm_model:{ARCHITECTURE}"


def register() -> None:
    """Make vLLM and transformers know the joint model; may be called again."""
    from vllm import ModelRegistry

    import mlpmem_ds.models.hf  # noqa: F401  its import registers the configuration with transformers

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: the model's code, and a GPU with it, is touched in the process that runs the model alone.
        ModelRegistry.register_model(ARCHITECTURE, _MODEL)

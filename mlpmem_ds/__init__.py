"""MLP memory on DeepSpeed: give a language model a memory that was pretrained to imitate a retriever."""

__version__ = "0.1.0"

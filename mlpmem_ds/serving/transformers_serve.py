"""The command `transformers serve` for exports: `python -m mlpmem_ds.serving.transformers_serve EXPORT`.

transformers' server looks for the model's class among its own, and would not find ours; after this all of its
options are there. Needs the packages of `pip install "transformers[serving]"`.
"""

import sys

import transformers

from mlpmem_ds.models.hf import MemoryAugmentedLM


def main() -> None:
    """`transformers serve` with the arguments of the command line."""
    from transformers.cli.transformers import app

    setattr(transformers, MemoryAugmentedLM.__name__, MemoryAugmentedLM)
    app(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Continue prompts with an exported model, with the memory, without it, or both side by side."""

import sys
from functools import partial

from mlpmem_ds.core.front_end import run_front_end
from mlpmem_ds.core.world import World
from mlpmem_ds.stages.generation import generate


def run(config: generate.Config, world: World) -> None:
    if config.stream:
        generate.run(config, world, write=partial(print, end="", flush=True))
        print()
    else:
        print(generate.run(config, world))


def main(argv: list[str] | None = None) -> int:
    return run_front_end(
        generate.Config,
        run,
        argv=argv,
        description=(
            "Continue prompts with the output of tools/convert_checkpoint.py; greedy unless --temperature is"
            " given."
        ),
        example=(
            'python launch/generate.py --model run/export --prompt "def read(self, " --max-new-tokens 40'
            " --compare"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())

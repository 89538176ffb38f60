"""`python -m mlpmem_ds.benchmarks.gpu_check`."""

import sys

from mlpmem_ds.core.front_end import Run, guarded


def main() -> int:
    """The check; its libraries are loaded where an error is a line."""

    def check(_: Run) -> int:
        from mlpmem_ds.benchmarks.gpu_check.gpu_check import main as check_machine

        return check_machine()

    return guarded(check, prog="gpu_check.sh")


if __name__ == "__main__":
    sys.exit(main())

"""`tools/gpu_check.sh`: does all of it work, and how fast, on a machine with GPUs? A quarter of an hour.

Read in this order:
    __main__            `python -m mlpmem_ds.benchmarks.gpu_check`
    gpu_check           the flags; runs the steps one after another, prints OK or FAIL, writes the JSON
    figures             what a step measures, with its goal, and how it reports it
    sizes               the sizes of the steps: those of one H100, and tiny ones for a rehearsal
    steps               the list of the steps; one step in a process of its own
    machine             packages, GPUs, disk; the tests that need a GPU
    kernels             the loss, search and assignment
    made_up             bases of random weights, and corpora, that the steps below read
    pipeline            the front-ends: extraction, training, checkpoint, conversion, generation
    ranks               the same front-ends with a rank on each GPU: the same bytes, each its own GPU
    probes              commands that say afterwards which GPUs they used, and how long those waited
"""

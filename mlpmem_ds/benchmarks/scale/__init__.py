"""Benchmark `scale`: what grows with ranks, keys and positions, counted on a CPU at the sizes of a cluster.

    scale               the flags; runs the measures of all areas, compares them with their goals
    measure             what a measure is: a name, a function, a goal
    operations          counts what would be kernels on a GPU
    extraction          extraction: what leaves a GPU
    reader              the training reader: rows read, the order of an epoch, memory
    search              search among keys: device operations of a query, uploads
    index               building an index: sample rows and sums of a rank, a shard's size
    counted_calls       counts opens, stats and listings of files
    metadata            files: opens, stats, bytes hashed by a rank
    targets             targets over several ranks, against one

An area has `MEASURES`; a measure that does not exist yet is not in it.
"""

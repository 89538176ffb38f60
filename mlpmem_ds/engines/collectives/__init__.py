"""What ranks that were launched together exchange: sums, values, parts of arrays, numbers of a counter.

Read in this order:
- `ranks.py`: `Ranks`, what every way offers; `opening.py`: `open_ranks` chooses one
- `alone.py`: one rank; `torch_group.py`: torch.distributed (torchrun, deepspeed); `mpi.py`: mpi4py (mpirun,
  srun); `files.py`: a folder that the ranks share
- `pairwise.py`: arrays of any shape from each rank to each other one, in messages of bounded size
- `heartbeat.py`: long waits, and ranks that show no sign of life; `rank_watch.py`: the same next to a library
  that waits, by threads
"""

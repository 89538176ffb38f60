# The settings of one run on a Slurm cluster. Copy this file, fill it in, and give it to the pipeline:
#     cp launch/slurm/settings.sh big.sh   # fill it in, then: bash launch/slurm/pipeline.sh --dry-run big.sh
# It is read by bash. What it names is checked before anything is submitted.
# shellcheck shell=bash disable=SC2034

RUN=                   # directory for all results, on a file system that all nodes share
BASE=                  # the language model: a directory, or the name of one in the cache of the Hub
TEXT=()                # of prepare_corpus: files and directories to read
TOKENIZER=$BASE        # of prepare_corpus: a directory, a name in the cache, or train:VOCAB
GENERAL=()             # of fit_gate: corpus directories of other text, where the base shall stay as it is
DS_CONFIG=ds_configs/zero2.json  # of train; ds_configs/README.md says which is for what

# The stages, in the order of the data. prepare_corpus goes in front where $RUN/corpus is not there yet; where
# there is no base, train_base after it, with BASE=$RUN/base and TOKENIZER=train:32000. Without build_index
# the targets are searched exactly. fit_gate after train makes a weight for each token in place of one for
# all, and evaluate and convert_checkpoint take it.
STAGES=(extract_keys build_index write_targets train evaluate convert_checkpoint)

# What makes `python` the right one, on the nodes and here: modules, an environment. That of launch/setup.sh,
# .venv, has no packages for GPUs alone; docs/install.md says what one for GPUs needs.
ENVIRONMENT='source .venv/bin/activate'

# Flags of every sbatch and every srun: partition, account, constraints.
SBATCH_FLAGS=(--exclusive)  # such as --partition=gpu --account=project --mem=0
SRUN_FLAGS=()               # such as --mpi=pmix
NETWORK=                    # that joins the nodes (launch/env.sh); empty: the libraries' choice
SECONDS_TO_SAVE=300         # before its time is over a job is asked to save

# One task is one rank; with GPUs, give each node as many tasks as GPUs.
#         stage               nodes  tasks a node  cores a task  GPUs a node   time
resources prepare_corpus          1             8             1            0    4:00:00
resources train_base              1             8             8            8   24:00:00
resources extract_keys            2             8             8            8   24:00:00
resources build_index             2             8             8            8   24:00:00
resources write_targets           2             8             8            8   24:00:00
resources train                   2             8             8            8   24:00:00
resources fit_gate                1             8             8            8    4:00:00
resources evaluate                1             8             8            8   12:00:00
resources convert_checkpoint      1             1             8            0    2:00:00

# Flags that a stage gets besides its inputs and outputs, which its file in launch/slurm/ has.
flags write_targets --corpus "$RUN/corpus" --exclude same-document  # a text is no neighbour of itself
flags train --preset 1b --batch-positions 262144 --micro-batch-positions 16384 --learning-rate 3e-4 \
    --schedule wsd --save-every-steps 200

#!/usr/bin/env bash
# Slurm's packages of this Debian or Ubuntu, unpacked into a directory and not installed, for test_slurm.py:
#     bash tests/cluster/fetch_slurm.sh DIRECTORY && export MLPMEM_SLURM=DIRECTORY
set -euo pipefail
mkdir -p "${1:?give a directory}"
cd "$1"
[ ! -x usr/bin/sbatch ] || exit 0
packages=$(apt-get install --simulate --no-install-recommends slurm-wlm | awk '$1 == "Inst" {print $2}')
# shellcheck disable=SC2086
apt-get --quiet --quiet download ${packages:?Slurm is installed already, or not known to apt}
for package in *.deb; do dpkg --extract "$package" .; done
rm -- *.deb

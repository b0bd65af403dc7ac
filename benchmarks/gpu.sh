#!/usr/bin/env bash
# Tests and measures on a GPU machine without a network, in two calls that take nine minutes together. The machine needs
# python3 with torch 2.11 or later.
#
#   make gpu-bundle                      elsewhere: libraries and packages that the machine lacks, in build/gpu-bundle
#   OUT=results/a benchmarks/gpu.sh a    240 s: versions, every kernel against fp64, compute-sanitizer, tests/ops, and
#                                        a part of the sweep
#   OUT=results/b benchmarks/gpu.sh b    300 s: attention, memory-bound operators, a training step, a run that is
#                                        killed and resumed, a profile
#   DEVICE=cpu benchmarks/gpu.sh a       rehearsal: the same steps on the CPU with fewer and smaller cases; STRETCH=5
#                                        multiplies the limits
#
# A step that fails, runs out of time or lacks a package is reported, and the others still run; the exit status is then
# 1. $OUT receives one JSON file per step, which is replaced after every row, report.txt and log.txt. The steps are
# defined in benchmarks/gpu/calls.py.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
    a | b) ;;
    *)
        echo "error[2] no such call; where=benchmarks/gpu.sh; got=${1:-nothing}; want=a or b; do=benchmarks/gpu.sh a" >&2
        exit 2
        ;;
esac

export OUT=${OUT:-benchmarks/results/gpu-$1}
export DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$PWD:$PWD/build/gpu-site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 DS_BUILD_OPS=0
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} # where the libraries must be built on the machine
# DeepSpeed and setup.py read CUDA_HOME. nvcc on the PATH may be a link or a wrapper, so its dry run gives the root.
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
    CUDA_HOME=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
    export CUDA_HOME
fi
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$1"

#!/usr/bin/env bash
# All that a GPU machine can show in ten minutes: builds the libraries for its GPU, loads them, runs the operators' tests on it, the
# benchmarks of every operator and a short training run. No network. A step that fails or runs out of time is reported, the others still run;
# the exit status is 1 when any did.
#
#   OUT=results benchmarks/gpu.sh             needs python3 with torch 2.11 or later, nvcc, g++, and what pyproject.toml lists for import
#   DEVICE=cpu OUT=/tmp/try benchmarks/gpu.sh tries the script itself: the same steps on the CPU, quick
#   WHEELS=folder                             wheels to install into a folder of our own first: build/gpu-wheels where there is one, which
#                                             `make gpu-wheels` fills elsewhere with what a machine with torch alone tends to lack
#
# What a step needs and the machine lacks is named, and the step left out; a kernel that fails takes its own tests and its own rows along.
#
# Leaves in $OUT: report.txt (summary and tables), results.json (all rows), log.txt (the output of every step).
set -u -o pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results/gpu}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570} # seconds in total; steps that no longer fit are left out
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"
: >"$OUT/log.txt"
: >"$WORK/summary"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 DS_BUILD_OPS=0
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS
failures=0

# step NAME SECONDS COMMAND...: runs it under a time limit; its output goes to the log, and its outcome to the summary.
step() {
    local name=$1 limit=$2 start=$SECONDS status=0 verdict
    shift 2
    limit=$((limit < BUDGET - SECONDS ? limit : BUDGET - SECONDS))
    : >"$WORK/said"
    : >"$WORK/complained"
    if [ "$limit" -lt 5 ]; then
        failures=$((failures + 1))
        printf '%-28s %4d s  %s\n' "$name" 0 "NOT RUN: the $BUDGET s of the whole are spent" | tee -a "$WORK/summary"
        return 0
    fi
    echo "=== $name: $*" >>"$OUT/log.txt"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$WORK/said" 2>"$WORK/complained" || status=$?
    cat "$WORK/said" "$WORK/complained" >>"$OUT/log.txt"
    case $status in
        0) verdict=ok ;;
        124 | 137) verdict="OUT OF TIME after $limit s" ;;
        *) verdict="FAILED ($status): $(tail -n 1 "$WORK/complained" | cut -c 1-160)" ;;
    esac
    [ "$status" = 0 ] || failures=$((failures + 1))
    printf '%-28s %4d s  %s\n' "$name" $((SECONDS - start)) "$verdict" | tee -a "$WORK/summary"
    return 0
}

# left_out NAME WHY: a step that cannot run here.
left_out() {
    printf '%-28s %4d s  %s\n' "$1" 0 "LEFT OUT: $2" | tee -a "$WORK/summary"
}

# lacking MODULE...: those that python cannot find.
lacking() {
    "$PYTHON" -c 'import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "$@"
}

# bench NAME SECONDS COMMAND...: a step whose rows are recorded: the table for the report, the JSON for results.json.
bench() {
    local name=$1
    step "$name" "$2" "$PYTHON" "${@:3}" --json
    tail -n 1 "$WORK/said" >"$WORK/$name.json"
    grep ' ratio ' "$WORK/complained" >>"$WORK/tables"
}

[ -z "${WHEELS:-}" ] && [ -d build/gpu-wheels ] && WHEELS=build/gpu-wheels
if [ -n "${WHEELS:-}" ]; then
    step wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$WORK/site"
fi
step machine 60 "$PYTHON" -c '
import platform, torch
print(platform.platform(), "torch", torch.__version__, "CUDA", torch.version.cuda)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
'
cat "$WORK/said"
lacks=$(lacking numpy orjson pydantic pytest tensorboard tokenizers transformers yaml)
[ -z "$lacks" ] || left_out packages "no ${lacks// /, no } here (WHEELS=folder brings them): their steps are left out below"

quick=(--quick)
if [ "$DEVICE" = cuda ]; then
    quick=()
    # nvcc on the PATH may be a link or a wrapper: it reports its own root.
    CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)}
    export CUDA_HOME
    # 9.0 has instructions of its own, which need the target 9.0a; a list of one architecture compiles in a third of the time.
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c 'import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}.{minor}" + "a" * (major == 9))')}
    export TORCH_CUDA_ARCH_LIST
    if [ -z "${NEOX_BUILD_ISA:-}" ]; then
        NEOX_BUILD_ISA=$(grep -q avx512vl /proc/cpuinfo && echo avx512 || echo avx2)
        export NEOX_BUILD_ISA
    fi
    step build 200 "$PYTHON" setup.py build_ext --inplace
fi
step load 60 "$PYTHON" -c '
import sys
import neox.ops
for name in neox.ops.__all__:
    if name not in neox.ops.HELPERS:
        print(name, "|", neox.ops.backend(name))
if sys.argv[1] == "cuda" and neox.ops.CUDA != "loaded":
    sys.exit(f"the CUDA library is {neox.ops.CUDA}")
' "$DEVICE"
cat "$WORK/said"

tests=(tests/ops)
[ "$DEVICE" = cuda ] || tests=(tests/ops/test_bias_gelu.py)
parallel=(-n 4)
[ -z "$(lacking xdist)" ] || parallel=()
: >"$WORK/tests"
run_tests() {
    step "$1" "$2" "$PYTHON" -m pytest -q ${parallel[@]+"${parallel[@]}"} -m 'not fuzz and not sweep' -p no:cacheprovider --device "$DEVICE" "${@:3}"
    grep -E '^(FAILED|ERROR|SKIPPED)|passed|failed' "$WORK/said" >>"$WORK/tests"
}
if [ -n "$(lacking pytest)" ]; then
    left_out tests "no pytest"
else
    run_tests tests 150 "${tests[@]}"
    # A kernel that fails can take its process with it, and the tests of others that ran there: files with failures run again, each alone.
    parallel=()
    for file in $(sed -nE 's/^(FAILED|ERROR) ([^: ]+\.py).*/\2/p' "$WORK/said" | sort -u); do
        run_tests "alone: $(basename "$file" .py)" 40 "$file"
    done
fi

for script in benchmarks/ops/bench_*.py; do
    name=$(basename "$script" .py)
    [ "$name" = bench_linear ] && continue # a choice between torch's products on a CPU
    bench "${name#bench_}" 45 "$script" --device "$DEVICE" ${quick[@]+"${quick[@]}"}
done
lacks=$(lacking orjson pydantic tensorboard tokenizers transformers yaml)
if [ -n "$lacks" ]; then
    left_out training "no ${lacks// /, no }"
else
    bench training 120 benchmarks/train/bench_gpu.py --quick # Pythia-160M; without a GPU it reports that and has no rows
fi

"$PYTHON" - "$WORK" "$OUT/results.json" <<'END'
import json, pathlib, sys

rows = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    try:
        rows += json.loads(path.read_text() or "[]")
    except ValueError:
        print(f"{path.stem}: no rows", file=sys.stderr)
pathlib.Path(sys.argv[2]).write_text(json.dumps(rows, indent=1) + "\n")
END
{
    echo "ratio > 1: ours is better; against \"memory copy\" it is the share of the copy bandwidth"
    cat "$WORK/tables" 2>/dev/null
    echo
    echo "tests"
    tail -n 40 "$WORK/tests"
    echo
    cat "$WORK/summary"
} >"$OUT/report.txt"
cat "$OUT/report.txt"
[ "$failures" = 0 ]

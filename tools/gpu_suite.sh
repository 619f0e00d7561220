#!/usr/bin/env bash
# One command for a machine with a GPU, no network needed: builds csg_ext for that GPU, runs every test with CUDA,
# compute-sanitizer and the benchmarks, and writes OUTDIR/summary.json, OUTDIR/summary.md and OUTDIR/performance.md.
#
#   tools/gpu_suite.sh OUTDIR [build gpu tests sanitizer benchmarks]      (default: all five)
#
# gpu runs the tests that use the GPU, tests all of them: most need none, and those that want a package that the machine
# lacks fail. The package of the part build is kept for later calls with other parts.
#
# Needs on the machine: torch with CUDA, nvcc, setuptools, pytest, and for what they serve matplotlib, Triton,
# scikit-learn, compute-sanitizer. PYTHON names the interpreter. A step that fails is recorded and the next one
# runs; the exit status is 0 only if all succeeded. OUTDIR/log.txt holds what the steps printed. SUITE_SECONDS limits the
# whole: what has not run by then is recorded as timed out, and the summary is written in time.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUTDIR [build gpu tests sanitizer benchmarks]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
parts=" ${*:-build gpu tests sanitizer benchmarks} "
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
work=${TMPDIR:-/tmp}/csg_gpu_suite-$(id -u)
mkdir -p "$work" || exit 2
# The package is installed into a folder of its own; PYTHONSAFEPATH keeps the source tree from hiding it.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PATH="$work/site/bin:$PATH"
steps=$work/steps.tsv
rm -f "$work"/*.log "$work"/*.xml
: >"$steps"
: >"$out/log.txt"
deadline=$((${SUITE_SECONDS:-86400} - 20)) # the summary takes its time, too
trap 'exit 143' TERM INT
finish() {
  "$python" tools/gpu_summary.py "$work" "$out"
  exit $?
}
trap finish EXIT

# step NAME SECONDS COMMAND...: run, keep the output, record name, exit status and duration.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  printf '== %s: %s\n' "$name" "$*" | tee -a "$out/log.txt"
  [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
  if [ "$limit" -le 5 ]; then
    : >"$work/step.log"
    status=124
  else # interrupted, pytest still writes down what has run
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/log.txt" >"$work/step.log"
    status=${PIPESTATUS[0]}
  fi
  [ $status -eq 0 ] || tail -n 25 "$work/step.log"
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" "${*//$'\n'/ }" >>"$steps"
  printf '   exit status %s, %s s\n' "$status" "$((SECONDS - start))" | tee -a "$out/log.txt"
}
wanted() { case $parts in *" $1 "*) true ;; *) false ;; esac; }

if wanted build; then
  # Only this GPU's architecture, unless told otherwise: the full list is CI's task and takes minutes.
  if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) || true
    export TORCH_CUDA_ARCH_LIST
  fi
  rm -rf "$work/site"
  NVCC_APPEND_FLAGS=-lineinfo step build 550 "$python" -m pip install --no-build-isolation --no-deps --no-compile \
    --disable-pip-version-check --verbose --target "$work/site" .
  step info 60 "$python" -m csg_ext.info
  step cuda 60 "$python" -c 'import sys, torch, csg_ext._extension as e
sys.exit(e.CUDA_ERROR or (None if torch.cuda.is_available() else "torch finds no GPU"))'
  step smoke 120 "$python" tools/smoke_test.py
fi
run_tests() { # run_tests NAME ARGUMENT...: pytest, its results in $work/NAME.xml
  step "$1" 590 "$python" -m pytest -q --continue-on-collection-errors --junitxml="$work/$1.xml" \
    -o cache_dir="$work/pytest" "${@:2}"
}
if wanted gpu; then # a process for each file: after a kernel that fails, its process can use the GPU no more
  for name in on_gpu evaluate_model gate_step gated_pool gated_pool_transforms mis_metric mutual_info_approximate mutual_info_arguments; do
    run_tests "test_$name" "tests/test_$name.py" -k "test_on_gpu or [cuda or -cuda"
  done
fi
wanted tests && run_tests tests
if wanted sanitizer; then
  for tool in "memcheck --report-api-errors no" racecheck synccheck initcheck; do
    # Without torch's caching allocator every tensor is an allocation whose end the sanitizer knows. Calls that fail are
    # checked by torch and the kernels' launches; torch may make some on purpose.
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "${tool%% *}" 180 compute-sanitizer --tool $tool --error-exitcode 9 \
      --target-processes all "$python" tools/sanitizer_workload.py
    cp "$work/step.log" "$work/${tool%% *}.log"
  done
fi
if wanted benchmarks; then
  step mutual_info 300 "$python" tools/gpu_mutual_info.py
  cp "$work/step.log" "$work/mutual_info.log"
  rm -rf "$out/benchmarks" "$out/performance.md"
  for part in gate_step end_to_end gated_pool --from-json; do  # the last writes the page from what succeeded
    PYTHONPATH=$PWD/benchmarks:$PYTHONPATH step "benchmarks ${part#--}" 590 "$python" benchmarks/report.py "$part" \
      --results "$out/benchmarks" --output "$out/performance.md"
  done
fi

#!/usr/bin/env bash
# What only a GPU can show, in two calls of at most 7 minutes on one GPU, without a network:
#
#   benchmarks/gpu.sh a|b [--dry] [FOLDER]
#
# a: does every kernel run, is it right, and is it fast. b: exact tests, memcheck, profiles, races and tuning.
# The most valuable parts come first, each within its own limit. After each part <stage>.tgz and summary-<stage>.txt
# in FOLDER (else $OUT, else build/gpu) are written anew, so that a call may be cut off at any moment.
# --dry runs the same parts without a GPU: interpreted kernels, skipped tests, tiny benchmarks.
# PYTHON names the interpreter. It needs torch, triton, numpy, pytest, hypothesis, rich and matplotlib; nothing is
# installed. ONLY is a regular expression of the parts to run. The exit status is that of the worst part. Parts
# without a tool or without time are named and do not count.
set -uo pipefail

usage() { sed -n '4s/^# *//p' "$0" >&2 && exit 2; }
stage=${1:-}
case $stage in a | b) shift ;; *) usage ;; esac
dry=no out=
for argument; do
  case $argument in
    --dry) dry=yes ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage
      out=$argument ;;
  esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${out:-${OUT:-build/gpu}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

begin=$SECONDS
total_s=${TOTAL_S:-410}
worst=0
python=${PYTHON:-python3}

# Logs and caches lie here; FOLDER holds two files a stage and nothing else.
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
work=$scratch/$stage
summary=$work/summary.txt
mkdir -p "$work" "$scratch/path/dragon"

# The import packages as a tree of links: needs no pip, no network and no right to write elsewhere.
ln -s "$PWD/dragon_vm" "$scratch/path/dragon/vm"
ln -s "$PWD/kernels" "$scratch/path/dragon/kernels"
export PYTHONPATH=$scratch/path:$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/dragon-gpu-triton}
export DRAGON_VM_TUNING_DIR=$scratch/tuning MPLCONFIGDIR=$scratch/matplotlib
export PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer
[ $dry = yes ] && export TRITON_INTERPRET=1 OMP_NUM_THREADS=1

deliver() {
  tar czf "$out/$stage.tgz.part" -C "$work" . && mv "$out/$stage.tgz.part" "$out/$stage.tgz"
  cp "$summary" "$out/summary-$stage.txt"
}

say() {
  printf '%s\n' "$*" | tee -a "$summary"
  deliver
}

# part NAME LIMIT_S COMMAND...: run it into NAME.log within its own time and that of the stage.
part() {
  local name=$1 limit=$2 start=$SECONDS left status
  shift 2
  [[ $name =~ ^(${ONLY:-.*})$ ]] || return 0
  left=$((total_s - (SECONDS - begin)))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 8 ]; then
    say "$name: not run: no time is left"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1
  status=$?
  [ "$status" -gt "$worst" ] && worst=$status
  case $status in
    0) status=passed ;;
    124 | 137) status="CUT OFF after $limit s" ;;
    *) status="FAILED with status $status" ;;
  esac
  say "$name: $status in $((SECONDS - start)) s: $(grep -v '^ *$' "$work/$name.log" | tail -n 1 | cut -c1-150)"
}

# tool NAME: whether a part that needs a command can run; a dry run leaves the command away.
tool() {
  [ $dry = yes ] && return
  command -v "$1" >/dev/null && return
  say "$1: its parts are not run: it is not on this machine"
  return 1
}

# bench LIMIT_S NAME ARGUMENT...: records of done cases survive a cut.
bench() {
  local limit=$1 name=$2
  shift 2
  part "$name" "$limit" "$python" -m benchmarks --device "$device" --rounds "$rounds" --turns "$turns" \
    --budget $((limit - 12)) --out "$work/benchmarks.jsonl" "$@"
}

# pytests LIMIT_S NAME MARK FILE...: the tests of some files; others may import packages that are not there.
pytests() {
  local limit=$1 name=$2 mark=$3 workers=()
  shift 3
  # Timings need the GPU for themselves.
  [ "$name" != timers ] && [ $dry = no ] && "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 -p no:benchmark)
  part "$name" "$limit" "$python" -m pytest -q -m "$mark" "${workers[@]}" -p no:cacheprovider "$@"
}

cases() { for name in "$@"; do printf '%s\0' --case "$name"; done; }

device=cuda rounds=9 turns=0.4 flag=()
if [ $dry = yes ]; then device=cpu rounds=2 turns=0.05 flag=(--dry); fi

stage_a() {
  local large=("1 x 1B" "10000 x 1000") quick=("300 x 1000, changing" "GPT-2 124M" "chain, GPT-2 124M" "1000 x 1000" "465 groups" "1000 x 16" "1 x 20M")
  local fast=(--contender "torch fused" --contender "torch foreach" --contender "ours triton") files
  local rivals=("${fast[@]}" --contender optimi --contender "flashoptim unquantized")
  if [ $dry = yes ]; then large=("10 x 16") quick=("10 x 16"); fi
  mapfile -d '' -t large < <(cases "${large[@]}")
  mapfile -d '' -t quick < <(cases "${quick[@]}")
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu|graphed' tests/torch tests/kernels)
  part kernels 80 "$python" -m tests.sanitize "${flag[@]}"
  bench 75 headline "${large[@]}" --dtype fp32 "${fast[@]}"
  part probe 160 "$python" -m benchmarks.probe "${flag[@]}" --out "$work/probe.jsonl"
  pytests 80 tests gpu "${files[@]}"
  bench 60 quick "${quick[@]}" "${rivals[@]}" --dtype fp32
  bench 60 mixed "${quick[@]}" "${rivals[@]}" --dtype bf16
  bench 60 slow "${quick[@]}" --dtype fp32 --contender "torch for-loop" --contender "ours eager" \
    --contender "torch compiled"
  part report 20 "$python" -m benchmarks report --results "$work/benchmarks.jsonl" --page "$work/performance.md"
  tail -n 40 "$work/headline.log" 2>/dev/null
  grep -sE '"(copy|update|norm|step|graph|launch)"' "$work/probe.jsonl" | cut -c1-200 | head -n 50
}

stage_b() {
  local exact=(tests/kernels tests/torch/optim/test_{parity,chain,sums}.py tests/torch/optim/groups/test_buffers.py) check=() racecheck=() profile=() tests=("$python" -m tests.sanitize "${flag[@]}")
  local modes=mode
  if [ $dry = yes ]; then exact=(tests/kernels/test_norm.py) modes="mode split8, 8-bit states"; fi
  pytests 110 exact "not gpu" "${exact[@]}"
  if tool compute-sanitizer; then
    if [ $dry = no ]; then
      check=(compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9)
      racecheck=(compute-sanitizer --tool racecheck --error-exitcode 9)
    fi
    # Without torch's cache each tensor is an allocation of its own: the first byte behind it is out of bounds.
    part memcheck 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" "${tests[@]}" --variant fp32
    part memcheck_modes 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" "${tests[@]}" --variant "$modes"
  fi
  if tool ncu; then
    [ $dry = no ] && profile=(ncu --clock-control none --set basic --section MemoryWorkloadAnalysis
      --section WarpStateStats -k 'regex:update_kernel|norm_kernel' -c 8)
    part ncu 35 "${profile[@]}" "$python" -m benchmarks.probe.profiled "${flag[@]}"
  fi
  pytests 30 timers gpu tests/tuning/test_timer.py tests/benchmarks/test_timing.py
  if tool compute-sanitizer; then part racecheck 40 "${racecheck[@]}" "${tests[@]}" --variant norm; fi
  if [ $dry = yes ]; then
    part tune 30 "$python" -m dragon.vm.tune --case small --kernel "adam fp32" --time-budget 3s
  else
    part tune 85 "$python" -m dragon.vm.tune --case large --time-budget 70s
  fi
  part export 25 "$python" -m dragon.vm.tune --export "$work/tuning.json"
}

say "stage $stage, $(date -u +%Y-%m-%dT%H:%M:%SZ), commit ${DRAGON_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}"
part about 40 "$python" -c '
import sys, torch, triton, dragon.kernels, dragon.vm.torch.optim
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{name}, python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}")'
if [ "$worst" -ne 0 ]; then
  say "stopped: $python must import torch, triton and dragon.vm.torch; see about.log"
  exit 1
fi
"stage_$stage"
say "stage $stage took $((SECONDS - begin)) s; see $out"
exit "$worst"

#!/usr/bin/env bash
# Everything that only a GPU can show, in one call, without a network, in under 10 minutes on one GPU:
# the tests marked `gpu`, compute-sanitizer on every kernel variant, and the benchmarks.
#
#   benchmarks/gpu.sh [--dry] [FOLDER]
#
# Leaves in FOLDER (else $OUT, else build/gpu): summary.txt, the log of each part, the benchmarks' JSON lines, and
# the page and pictures made of them. --dry runs what can be run without a GPU, and little of it.
# PYTHON names the interpreter; it needs torch, triton, pytest, hypothesis, rich and matplotlib, and nothing is
# installed. The exit status is that of the worst part; parts that cannot run here don't count.
set -uo pipefail

dry=no
if [ "${1:-}" = --dry ]; then dry=yes && shift; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${1:-${OUT:-build/gpu}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
python=${PYTHON:-python3}
summary=$out/summary.txt
worst=0
begin=$SECONDS

# The import packages as a tree of links: needs no pip, no network and no right to write elsewhere.
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/path/dragon"
ln -s "$PWD/dragon_vm" "$scratch/path/dragon/vm"
ln -s "$PWD/kernels" "$scratch/path/dragon/kernels"
export PYTHONPATH=$scratch/path:$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
export MPLCONFIGDIR=$scratch/matplotlib

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# part NAME LIMIT_S COMMAND...: run it into NAME.log within its time, and say how it ended.
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  [ "$status" -gt "$worst" ] && worst=$status
  case $status in
    0) status=passed ;;
    124 | 137) status="CUT OFF after $limit s" ;;
    *) status="FAILED with status $status" ;;
  esac
  say "$name: $status in $((SECONDS - start)) s: $(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c1-150)"
}

find_sanitizer() {
  command -v compute-sanitizer && return
  for folder in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda-*; do
    for path in "$folder/bin/compute-sanitizer" "$folder/compute-sanitizer/compute-sanitizer"; do
      [ -x "$path" ] && echo "$path" && return
    done
  done
  return 1
}

# sanitize TOOL: every kernel variant under one tool. Without torch's cache of memory each tensor is an allocation
# of its own, so that the first byte behind it is out of bounds.
sanitize() {
  local tool=$1 status
  if ! sanitizer=$(find_sanitizer); then
    say "$tool: not run: no compute-sanitizer on this machine"
    return
  fi
  if ! timeout 30 "$sanitizer" --tool "$tool" "$python" -c 'import torch; torch.ones(8, device="cuda").sum().item()' \
    >"$out/$tool-probe.log" 2>&1; then
    say "$tool: not run: compute-sanitizer refuses this device: $(grep -m 1 -i error "$out/$tool-probe.log")"
    return
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 100 \
    "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.sanitize
}

: >"$summary"
say "$(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo "${DRAGON_COMMIT:-unknown}")"
if ! "$python" - <<'PY' 2>&1 | tee -a "$summary"
import sys, torch, triton
import dragon.vm.torch.optim, dragon.kernels
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{name}, python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}")
PY
then
  say "stopped: torch, triton and dragon.vm.torch must be importable by $python"
  exit 1
fi

part kernels 120 "$python" -m benchmarks.sanitize $([ $dry = yes ] && echo --dry)
# Only the files that have such tests: others may import what a GPU machine lacks.
mapfile -t files < <(grep -rlE --include='*.py' 'mark\.gpu' tests | grep -v conftest)
part tests 200 "$python" -m pytest -m gpu -q -p no:cacheprovider "${files[@]}"
if [ $dry = yes ]; then
  say "memcheck, racecheck: not run: dry"
  part benchmarks 90 "$python" -m benchmarks --case "1000 x 1" --case "10 x 16" --dtype fp32 --rounds 3 \
    --turns 0.2 --device cpu --note "A dry run." --out "$out/benchmarks.jsonl"
else
  sanitize memcheck
  sanitize racecheck
  # What is left of 10 minutes, without a minute for the last case and the report.
  left=$((530 - (SECONDS - begin)))
  [ "$left" -lt 30 ] && left=30
  part benchmarks $((left + 45)) "$python" -m benchmarks --set full --turns 0.4 --budget "$left" --device cuda \
    --out "$out/benchmarks.jsonl"
fi
part report 60 "$python" -m benchmarks report --results "$out" --page "$out/performance.md"
sed -n '/^### Targets/,/^### [^T]/p' "$out/performance.md" 2>/dev/null | grep '^|' | tee -a "$summary"
say "all of it in $((SECONDS - begin)) s; see $out"
exit "$worst"

#!/usr/bin/env bash
# benchmarks.gpu.served where TensorRT has a Python of its own (3.9): the copy of the service that `scripts.backport`
# makes serves there, the load comes from this machine's python3.
#
#   bash benchmarks/gpu/run_served.sh one     one GPU: the engine alone, and served with 0, 2, 4 and 6 fronts
#   bash benchmarks/gpu/run_served.sh two     two GPUs, 0, 4, 8 and 12 fronts
#   bash benchmarks/gpu/run_served.sh tests   tests/gpu and tests/contract
#   bash benchmarks/gpu/run_served.sh check   the same without a GPU: a small model on ONNX Runtime; BARE prints what
#                                             benchmarks.gpu.bare would
#
# KIT (~/kit): a folder with env.sh, which sets the search paths, PY and WRK. CARRIED (.gpupkg): `served/tower` and
# `small`, written by `python -m benchmarks.gpu.packages`; `copy`, written by `python -m scripts.backport`, else it is
# made here; `py312`, packages that python3 lacks. Results go to OUT. WORK keeps plans from one call to the next.
# FRONTS, ROUNDS, SECONDS_EACH, PRECISIONS, CONNECTIONS, REQUESTS, LIMIT_S, CORES (such as 0-15) change what is
# measured. Every step ends in time or is ended.
set -euo pipefail
MODE=${1:-one}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ROOT=$PWD
KIT=$(realpath "${KIT:-$HOME/kit}")
CARRIED=$(realpath "${CARRIED:-.gpupkg}")
OUT=$(realpath -m "${OUT:-build/served}")
WORK=$(realpath -m "${WORK:-$HOME/served-work}")
mkdir -p "$OUT" "$WORK"

# this machine's Python sees nothing of the kit
python_here() { env -u PYTHONHOME -u LD_LIBRARY_PATH PYTHONPATH="$ROOT/app:$CARRIED/py312" PYTHONUNBUFFERED=1 timeout 60 python3 "$@"; }

COPY=$CARRIED/copy
if [ ! -d "$COPY/app/vernier" ]; then
  COPY=$WORK/copy
  env -u PYTHONHOME -u PYTHONPATH -u LD_LIBRARY_PATH timeout 60 python3 -m scripts.backport "$COPY"
fi

# shellcheck source=/dev/null
. "$KIT/env.sh"
cat > "$WORK/py39" <<X
#!/bin/sh
export LD_LIBRARY_PATH='$LD_LIBRARY_PATH' PYTHONHOME='$PYTHONHOME' PYTHONPATH='$COPY/app:$PYTHONPATH'
exec '$PY' "\$@"
X
cat > "$WORK/wrk" <<X
#!/bin/sh
export LD_LIBRARY_PATH='$KIT/root/usr/lib/x86_64-linux-gnu'
exec '$WRK' "\$@"
X
chmod +x "$WORK/py39" "$WORK/wrk"

timeout 60 "$WORK/py39" -m compileall -q "$COPY/app"
timeout 30 "$WORK/py39" -c 'import sys, numpy, uvloop, fastapi, vernier.processes.supervisor; print("service:", sys.version.split()[0])'
timeout 30 "$WORK/wrk" -v | head -1 || true

served() { # seconds, more options
  local limit=$1
  shift
  export WRK=$WORK/wrk
  timeout -k 5 $((limit + 20)) taskset -c "${CORES:-0-$(($(nproc) - 1))}" \
    env -u PYTHONHOME -u LD_LIBRARY_PATH PYTHONPATH="$ROOT/app:$CARRIED/py312" PYTHONUNBUFFERED=1 \
    python3 -m benchmarks.gpu.served "$CARRIED/${PACKAGE:-served/tower}/1" --work "$WORK" --limit-s "$limit" \
    --server "$WORK/py39 -m vernier" --bare "${BARE:-$WORK/py39 -m benchmarks.gpu.bare}" \
    --requests ${REQUESTS:-rows} --rounds "${ROUNDS:-3}" --seconds "${SECONDS_EACH:-3}" \
    --precision ${PRECISIONS:-fp16} ${CONNECTIONS:+--connections $CONNECTIONS} "$@" 2>&1 | tee "$OUT/served-$MODE.txt" || true
  tail -qn 20 "$WORK"/served-*.log > "$OUT/served-$MODE-service.log" 2>/dev/null || true
}

python_here -c 'import sys, numpy, httptools, uvloop, benchmarks.gpu.served; print("load:", sys.version.split()[0])'
case $MODE in
  one)
    timeout 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader || true
    served "${LIMIT_S:-130}" --devices 0 --fronts ${FRONTS:-0 2 4 6} --load-cores "${LOAD_CORES:-4}" --out "$OUT/served-one.json"
    ;;
  two)
    timeout 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader || true
    served "${LIMIT_S:-100}" --devices 0,1 --fronts ${FRONTS:-0 4 8 12} --load-cores "${LOAD_CORES:-8}" --out "$OUT/served-two.json"
    ;;
  tests)
    export VERNIER_TEST_APP=$COPY VERNIER_TEST_PACKAGES=$CARRIED/small VERNIER_TEST_FRONTS=${FRONTS:-2}
    timeout -k 5 "${LIMIT_S:-300}" "$PY" -m pytest -q -c tests/gpu/pytest.ini --rootdir=. --timeout 150 --durations 8 \
      ${TESTS:-tests/gpu tests/contract} 2>&1 | tee "$OUT/tests.txt" || true
    ;;
  check)
    : "${BARE:?a stand-in for the engine alone}"
    PACKAGE=small/mlp PRECISIONS=fp32 REQUESTS="${REQUESTS:-rows batches}"
    served "${LIMIT_S:-60}" --runtime onnxruntime --fronts ${FRONTS:-0 1} --load-cores 1 --out "$OUT/served-check.json"
    ;;
  *)
    echo "one, two, tests or check" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# All that needs a GPU, in one command of at most 8 minutes: the test suite on the device, then the figures.
# Leaves benchmarks/results/<gpu>-<date>.{md,json}; needs python3 with cupy, numba, scipy, torch and pytest, and no network.
# Warnings are no errors here: the machine's versions are its own.
#   bash benchmarks/gpu.sh [PYTHON]
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
gpu=$("$python" - 2>/dev/null <<'PY'
import re, cupy
print(re.sub(r"[^a-z0-9]+", "-", cupy.cuda.runtime.getDeviceProperties(0)["name"].decode().lower()).strip("-"))
PY
) || { echo "no usable GPU: $("$python" -m gglspeedup info 2>&1 | head -5)"; exit 1; }
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# Installed beside, not into the interpreter: adapters/ has to become gglspeedup.adapters.
"$python" -m pip install -q --no-deps --no-build-isolation --no-index --target "$site" . || exit 1
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1
mkdir -p benchmarks/results
stem="benchmarks/results/$gpu-$(date +%Y-%m-%d)"
status=0
# What is left of the 8 minutes decides how long a part may take, so that a slow one leaves out the last ones alone.
deadline=$((SECONDS + 470))
limited() {
    local left=$((deadline - SECONDS)) most=$1
    shift
    [ "$left" -gt 1 ] || { echo "left out: the time is up"; return 124; }
    timeout $((most < left ? most : left)) "$@"
}
{
    echo "# $gpu, $(date +%Y-%m-%d)"
    echo
    echo 'Made by `bash benchmarks/gpu.sh`.'
    echo
    echo '```'
    "$python" -m gglspeedup info
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv 2>&1
    echo '```'
    echo
    echo "## Tests on the device"
    echo
    echo '```'
    limited 200 "$python" -m pytest -q -W default -p no:cacheprovider --continue-on-collection-errors \
        tests/test_gpu.py tests/test_cuda_sample.py tests/test_cuda_many.py tests/test_cuda_each.py tests/test_cuda_gather.py tests/test_errors.py \
        tests/test_interchange.py tests/test_subgraphs.py tests/test_history_gpu.py 2>&1 | tail -25
    [ "${PIPESTATUS[0]}" = 0 ] || status=1
    echo '```'
    echo
    echo "## Under compute-sanitizer"
    echo
    echo '```'
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck; do
            echo "$tool:"
            limited 45 compute-sanitizer --tool "$tool" --error-exitcode 3 "$python" -m benchmarks.small 2>&1 | tail -5
            [ "${PIPESTATUS[0]}" = 0 ] || status=1
        done
    else
        echo "this machine has none"
    fi
    echo '```'
    echo
    echo "## Sampling"
    echo
    limited 120 "$python" -m benchmarks.sampling --device cuda:0 --peers --graphs products --rounds 5 --batches 50 \
        --json "$stem-sampling.json" 2>&1 || status=1
    echo "## Small batches, one by one and together (sample_many)"
    echo
    limited 45 "$python" -m benchmarks.sampling --device cuda:0 --peers --many --graphs rmat-20-30000000 --batch-size 64 \
        --batches 64 --rounds 5 --json "$stem-many.json" 2>&1 || status=1
    echo "## Gathering"
    echo
    limited 90 "$python" -m benchmarks.gather --device cuda:0 --rounds 5 --rows 8000000 --ids 1000000 \
        --json "$stem-gather.json" 2>&1 || status=1
    echo
    echo "## End to end"
    echo
    echo '```'
    limited 60 "$python" -m benchmarks.overlap --device cuda:0 --graph rmat-20-30000000 --hidden 128 --batches 50 \
        --threads 8 --json "$stem-overlap.json" 2>&1 || status=1
    limited 60 "$python" -m benchmarks.histories --device cuda:0 --hidden 256 --ratios 0.5 1.5 2.5 --rounds 5 \
        --json "$stem-histories.json" 2>&1 || status=1
    limited 70 "$python" -m benchmarks.depth --device cuda:0 --depths 4 16 --ways full gas recompute \
        --json "$stem-depth.json" 2>&1 || status=1
    if "$python" -c 'import torch_geometric, tqdm' 2>/dev/null; then
        limited 60 "$python" demo/sage_torch.py --dataset digits --device cuda:0 --out "$site/out" 2>&1 | tail -12
        [ "${PIPESTATUS[0]}" = 0 ] || status=1
    else
        echo "the demo was not run: this machine has no PyG or no tqdm"
    fi
    echo '```'
    exit "$status"  # of this side of the pipe
} | tee "$stem.md"
status=${PIPESTATUS[0]}
"$python" - "$stem" <<'PY'
import json, pathlib, sys
stem = sys.argv[1]
parts = [pathlib.Path(f"{stem}-{part}.json") for part in ("sampling", "many", "gather", "overlap", "histories", "depth")]
merged = {}
for part in parts:
    if part.exists():
        merged.update(json.loads(part.read_text()))
        part.unlink()
pathlib.Path(f"{stem}.json").write_text(json.dumps(merged, indent=1) + "\n")
PY
exit $status

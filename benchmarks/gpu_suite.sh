#!/usr/bin/env bash
# What only a GPU can show, on one GPU in at most nine minutes: tests of the kernels on the card, the layer against its
# rivals, Figure 3, and a real server with CUDA graphs whose tokens must equal the dense model's.
#
#     benchmarks/gpu_suite.sh [RESULTS_DIR]
#
# A step that fails or runs out of time is recorded and the next one starts. RESULTS_DIR/suite.md is the summary and
# RESULTS_DIR.tar.gz everything but weights. Exit status 0 where every step passed. Variables:
#
#     MODEL         bfloat16 checkpoint to serve, by default the shipped Mixtral; QUANTIZED: its quantized folder
#     TEXT          file that prompts are cut from, by default the shipped held-out text
#     STATISTICS    Mixtral's expert statistics for Figure 3
#     PEERS         peers of the layer benchmark, by default all
#     PARTS         folder of packed parts to unpack where vLLM is missing, by default .gpu
#     PYTHON        interpreter, by default python3
#     SUITE_SECONDS of everything, by default 540
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

results=${1:-${TMPDIR:-/tmp}/moeq-gpu-results}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 1
python=${PYTHON:-python3}
total=${SUITE_SECONDS:-540}
shipped=benchmarks/models/stdlib-mixtral
model=${MODEL:-$shipped}
site=${TMPDIR:-/tmp}/moeq-site
failed=0

export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_CACHE_MAXSIZE=4294967296 # the driver's cache of what it compiles: Marlin needs room

note() { # name status seconds: one line of the summary
    printf '| %s | %s | %s |\n' "$1" "$2" "$3" | tee -a "$results/suite.md"
}

step() { # name limit command...: run, keep the output, go on whatever happens
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    ((limit > total - SECONDS)) && limit=$((total - SECONDS))
    if ((limit < 10)); then
        note "$name" "no time left" 0
        failed=1
        return 124
    fi
    echo "== $name, at most $limit s"
    timeout --kill-after=30 "$limit" "$@" >"$results/$name.log" 2>&1
    status=$?
    tail -n 40 "$results/$name.log"
    case $status in
        0) note "$name" passed $((SECONDS - began)) ;;
        124 | 137) note "$name" "stopped after $limit s" $((SECONDS - began)) ;;
        *) note "$name" "failed, status $status" $((SECONDS - began)) ;;
    esac
    ((status == 0)) || failed=1
    return $status
}

prepare() {
    local part
    if ! "$python" -c 'import vllm' 2>/dev/null; then
        for part in "${PARTS:-.gpu}"/*/unpack.sh; do
            [ -e "$part" ] && sh "$part" "$site"
        done
    fi
    # The entry point, by which vLLM finds the plugin; the code is this tree's.
    mkdir -p "$site/vllm_moeq-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm-moeq\nVersion: 0\n' >"$site/vllm_moeq-0.dist-info/METADATA"
    printf '[vllm.general_plugins]\nmoeq = vllm_moeq:register\n' >"$site/vllm_moeq-0.dist-info/entry_points.txt"
    nvidia-smi
}

versions='
from importlib.metadata import entry_points
import torch, triton
print("torch", torch.__version__, "triton", triton.__version__, "CUDA", torch.version.cuda)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
plugins = [entry.value for entry in entry_points(group="vllm.general_plugins")]
import vllm
print("vllm", vllm.__version__, "plugins", plugins)
assert "vllm_moeq:register" in plugins
'

layer() { # output limit budget peers...
    local output=$1 limit=$2 budget=$3
    shift 3
    step "$output" "$limit" "$python" -m benchmarks.kernels.moe_layer --output "$results/$output" --budget-seconds "$budget" \
        --seconds-per-point 0.5 --probe-seconds 45 ${1:+--peers "$@"}
}

printf '| step | result | seconds |\n| --- | --- | ---: |\n' >"$results/suite.md"
prepare >"$results/prepare.log" 2>&1

step environment 60 "$python" -c "$versions"
step tests 90 "$python" -m pytest tests/kernels -m gpu -q -p no:cacheprovider

# shellcheck disable=SC2086 # PEERS is a list
layer layer 170 130 ${PEERS:-}
if [ -s "$results/layer/retry.txt" ]; then # a kernel broke the device: the others deserve their numbers
    # shellcheck disable=SC2046
    layer layer-retry 100 80 $(cat "$results/layer/retry.txt")
fi

table=mixtral-8x7b-statistics.json
for statistics in "${STATISTICS:-}" "${PARTS:-.gpu}/$table"; do
    [ -f "$statistics" ] && break
done
if [ -f "$statistics" ]; then
    step figure3 45 "$python" -m benchmarks.kernels.figure3 --statistics "$statistics" --output "$results/figure3" \
        --seconds-per-point 0.3
else
    note figure3 "skipped: no STATISTICS" 0
fi

step serving 240 "$python" -m benchmarks.serving.throughput --source "$model" ${QUANTIZED:+--quantized "$QUANTIZED"} \
    --text "${TEXT:-$shipped/held_out.txt}" --output "$results/serving" --check-dense

tar --exclude='*.safetensors' -czf "$results.tar.gz" -C "$(dirname "$results")" "$(basename "$results")"
cat "$results/suite.md"
exit $failed

#!/usr/bin/env bash
# What only a GPU can show, on one GPU in at most nine minutes: tests of the kernels on the card, the layer against its
# rivals, a real server with CUDA graphs whose tokens must equal the dense model's, and Figure 3. benchmarks/gpu has the
# steps; this script unpacks vLLM where it is missing.
#
#     benchmarks/gpu_suite.sh [RESULTS_DIR]
#
# A step that fails or runs out of time is recorded and the next one starts. RESULTS_DIR/suite.md is the summary.
# RESULTS_DIR.tar.gz has results and logs without weights, and without names of users, machines and folders. Exit status
# 0 where every step passed, 1 where one did not, 2 for a mistake, 130 after Ctrl-C: what was found by then is packed.
# Variables:
#
#     MODEL         bfloat16 checkpoint to serve, by default the shipped Mixtral; QUANTIZED: its quantized folder
#     TEXT          file that prompts are cut from, by default the shipped held-out text
#     STATISTICS    Mixtral's expert statistics for Figure 3
#     PEERS         peers of the layer benchmark, by default all
#     PARTS         folder of packed parts to unpack where vLLM is missing, by default .gpu
#     PYTHON        interpreter, by default python3
#     SUITE_SECONDS of everything, by default 540; the steps' limits grow with it
set -u
results=$(realpath -m "${1:-${TMPDIR:-/tmp}/moeq-gpu-results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

export PYTHON=${PYTHON:-python3}
site=${TMPDIR:-/tmp}/moeq-site
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_CACHE_MAXSIZE=4294967296 # the driver's cache of what it compiles: Marlin needs room

for part in "${PARTS:-.gpu}"/*/unpack.sh; do
    [ -e "$part" ] || continue
    "$PYTHON" -c 'import vllm' 2>/dev/null || sh "$part" "$site"
done
if ! "$PYTHON" -c 'from importlib.metadata import version; version("vllm-moeq")' 2>/dev/null; then
    # The entry point, by which vLLM finds the plugin; the code is this tree's.
    mkdir -p "$site/vllm_moeq-0.dist-info" || exit 1
    printf 'Metadata-Version: 2.1\nName: vllm-moeq\nVersion: 0\n' >"$site/vllm_moeq-0.dist-info/METADATA"
    printf '[vllm.general_plugins]\nmoeq = vllm_moeq:register\n' >"$site/vllm_moeq-0.dist-info/entry_points.txt"
fi
exec "$PYTHON" -m benchmarks.gpu.suite "$results"

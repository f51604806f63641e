#!/usr/bin/env bash
# The whole GPU table on a bare GPU machine without network: prints it beside vLLM's figures and the goals, writes JSON.
# usage: scripts/bench_gpu.sh [--rows A1 B3 D1 C2 …] [--seconds 60] [--models DIR] [--out DIR]   (see bench_gpu.py)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_bare.sh"
python3 "$root/scripts/bench_gpu.py" "$@"

#!/usr/bin/env bash
# Prefill and decode on two GPUs of one machine without network: conformance, transfers, handoff, serving; writes JSON.
# usage: scripts/bench_two_gpus.sh --part 1|2 [--steps NAME …] [--models DIR] [--out DIR] [--dry-run]   (see bench_two_gpus.py)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_bare.sh"
python3 "$root/scripts/bench_two_gpus.py" "$@"

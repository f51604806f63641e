#!/usr/bin/env bash
# The offline rows of the GPU table on a bare GPU machine without network: prints a table, writes JSON.
# usage: scripts/bench_gpu.sh [MODEL_DIR] [bench_gpu.py's options]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if ! python3 -c "import baton.proto" 2>/dev/null; then # not installed: the checkout is the package
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  ln -s "$root" "$site/baton"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
python3 "$root/scripts/bench_gpu.py" "$@"

#!/usr/bin/env bash
# The whole GPU table on a bare GPU machine without network: prints it beside vLLM's figures and the goals, writes JSON.
# usage: scripts/bench_gpu.sh [--rows A1 B3 D1 C2 …] [--seconds 60] [--models DIR] [--out DIR]   (see bench_gpu.py)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if ! python3 -c "import importlib.metadata as m; m.version('baton-serve')" 2>/dev/null; then
  site=$(mktemp -d) # not installed: the checkout is the package
  trap 'rm -rf "$site"' EXIT
  ln -s "$root" "$site/baton"
  mkdir "$site/baton_serve-0.dist-info"
  printf 'Metadata-Version: 2.1\nName: baton-serve\nVersion: 0\n' >"$site/baton_serve-0.dist-info/METADATA"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
python3 "$root/scripts/bench_gpu.py" "$@"

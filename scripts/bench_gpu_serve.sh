#!/usr/bin/env bash
# The served rows of the GPU table (B1 to B5) on a bare GPU machine without network: JSON per row.
# usage: scripts/bench_gpu_serve.sh MODEL_DIR OUT_DIR [SECONDS_OF_ARRIVALS=20] [ROW ...]   (more flags: SERVE_FLAGS)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
model=$1 out=$2 seconds=${3:-20}
rows=("${@:4}")
[ ${#rows[@]} -gt 0 ] || rows=(B1 B2 B3 B4 B5)
site=$(mktemp -d)
ln -s "$root" "$site/baton" # not installed: the checkout is the package
mkdir "$site/baton_serve-0.1.0.dist-info"
printf 'Metadata-Version: 2.1\nName: baton-serve\nVersion: 0.1.0\n' >"$site/baton_serve-0.1.0.dist-info/METADATA"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
baton() { python3 -P -m baton.frontend.cli.main "$@"; }

read -ra flags <<<"${SERVE_FLAGS:-}"
baton serve "$model" --served-model-name bench --unified 1 --device cuda --load-format dummy --max-model-len 8192 \
  --no-enable-prefix-caching --host 127.0.0.1 --port 8111 "${flags[@]}" >"$out/serve.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server"; rm -rf "$site"' EXIT
until grep -q "ready at" "$out/serve.log"; do
  kill -0 "$server" || { tail -20 "$out/serve.log"; exit 1; }
  sleep 0.5
done
tail -n 2 "$out/serve.log"

bench() { # NAME PROMPTS INPUT_LEN RATE
  baton bench serve --port 8111 --model bench --dataset-name random --seed 0 --ignore-eos \
    --temperature 0 --disable-tqdm --num-prompts "$2" --random-input-len "$3" --random-output-len 128 \
    --request-rate "$4" --output-json "$out/$1.json" | sed "s/^/$1 /" | grep -E "throughput|TTFT|TPOT|ITL|Successful"
}
bench warm-up 32 1024 16 >/dev/null
for row in "${rows[@]}"; do
  case $row in
    B1) bench B1 1000 100 inf ;;
    B2) bench B2 $((4 * seconds)) 1024 4 ;;
    B3) bench B3 $((8 * seconds)) 1024 8 ;;
    B4) bench B4 $((16 * seconds)) 1024 16 ;;
    B5) bench B5 $((24 * seconds)) 1024 24 ;;
    *) echo "no row $row" >&2; exit 2 ;;
  esac
done

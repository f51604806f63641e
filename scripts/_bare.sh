# Sourced by scripts for machines without network: where the project is not installed, the checkout is made the package.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! python3 -c "import importlib.metadata as m; m.version('baton-serve')" 2>/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  ln -s "$root" "$site/baton"
  mkdir "$site/baton_serve-0.dist-info"
  printf 'Metadata-Version: 2.1\nName: baton-serve\nVersion: 0\n' >"$site/baton_serve-0.dist-info/METADATA"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

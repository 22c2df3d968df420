# Sourced by the scripts beside it: finds or makes the virtual environment and installs the project into it, once.
#
#   environment_options "$@"     reads --python, --no-install and --help; what is left is in the array REST
#   prepare_environment EXTRA    leaves the interpreter in PYTHON and the folder of its commands in BIN
#
# Needs bash 3.2 or later and a Python of 3.10 to 3.13. Uses uv if it is on PATH, else pip.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SCRIPT="$(basename "$0")"
WANTED="${GRAM_ENV:-}"
INSTALL=yes
REST=()

fail() {
    printf '%s: %s\n' "$SCRIPT" "$*" >&2
    exit 1
}

say() {
    printf '[%s] %s\n' "$SCRIPT" "$*" >&2
}

environment_options() {
    while [ $# -gt 0 ]; do
        case "$1" in
            -h | --help) usage; exit 0 ;;
            --python)
                [ $# -ge 2 ] || fail "--python needs the path of an interpreter or of an environment's folder"
                WANTED="$2"
                shift 2 ;;
            --python=*) WANTED="${1#--python=}"; shift ;;
            --no-install) INSTALL=no; shift ;;
            *) REST+=("$1"); shift ;;
        esac
    done
}

environment_help() {
    cat <<'HELP'
  --python PATH   use this interpreter, or this environment's folder, instead of making .venv in the repository
                  (GRAM_ENV=PATH does the same; GRAM_ENV="$VIRTUAL_ENV" takes the active one). The script installs
                  the project there, and the packages that it needs and PATH lacks.
  --no-install    install nothing: end if the project or a package that it needs is missing
  --help          this text
HELP
}

fits() { # is "$1" a Python that the project supports?
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

suitable_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.10 python3 python; do
        if command -v "$name" >/dev/null 2>&1 && fits "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

make_environment() { # "$1": the folder
    local base
    if base="$(suitable_python)"; then
        say "making a virtual environment in $1 with $("$base" --version 2>&1)"
        if command -v uv >/dev/null 2>&1; then
            uv venv --quiet --clear --python "$base" "$1" || fail "uv could not make a virtual environment in $1"
        else
            "$base" -m venv --clear "$1" ||
                fail "$base could not make a virtual environment in $1 (on Debian and Ubuntu: apt install python3-venv)"
        fi
    elif command -v uv >/dev/null 2>&1; then
        uv venv --quiet --clear --python '>=3.10,<3.14' "$1" || fail "uv found no Python of 3.10 to 3.13"
    else
        fail "expected a Python of 3.10 to 3.13 on PATH, found none"
    fi
}

find_interpreter() { # sets PYTHON
    if [ -z "$WANTED" ]; then
        local folder="$ROOT/.venv"
        PYTHON="$folder/bin/python"
        if [ ! -e "$PYTHON" ] || ! "$PYTHON" -c '' >/dev/null 2>&1; then
            [ "$INSTALL" = yes ] || fail "$folder: expected an environment for --no-install, found none; give --python PATH"
            if [ -e "$folder" ] && [ ! -e "$folder/pyvenv.cfg" ] && [ -n "$(ls -A "$folder")" ]; then
                fail "$folder: expected a virtual environment, found something else; move it away or give --python PATH"
            fi
            make_environment "$folder"
        fi
    elif [ -d "$WANTED" ]; then
        PYTHON="$(cd "$WANTED" && pwd)/bin/python"
        [ -x "$PYTHON" ] || fail "$WANTED: expected an environment's folder with bin/python in it, found none"
    else
        PYTHON="$(command -v "$WANTED")" || fail "$WANTED: expected an interpreter or an environment's folder, found neither"
        case "$PYTHON" in /*) ;; *) PYTHON="$PWD/$PYTHON" ;; esac
    fi
    fits "$PYTHON" || fail "$PYTHON: expected Python 3.10 to 3.13, found $("$PYTHON" --version 2>&1)"
}

install_project() { # "$1": the extra
    local quiet=()
    [ -z "${CI:-}" ] || quiet=(--quiet)
    say "installing gram-meta[$1] and what it needs into the environment of $PYTHON (--no-install: install nothing);" \
        "torch comes along, which may take some minutes"
    if command -v uv >/dev/null 2>&1; then
        uv pip install ${quiet[@]+"${quiet[@]}"} --python "$PYTHON" --editable "$ROOT[$1]"
    else
        "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --default-pip >/dev/null 2>&1 ||
            fail "$PYTHON: expected pip there, or uv on PATH, found neither"
        "$PYTHON" -m pip install ${quiet[@]+"${quiet[@]}"} --editable "$ROOT[$1]"
    fi || fail "the installation into $PYTHON failed; the lines above say why"
}

prepare_environment() { # "$1": the extra
    find_interpreter
    if [ "$INSTALL" = no ]; then
        "$PYTHON" "$ROOT/scripts/installed.py" "$1" || fail "$PYTHON: lacks the above; without --no-install, it is installed there"
    elif ! "$PYTHON" "$ROOT/scripts/installed.py" "$1" 2>/dev/null; then
        install_project "$1"
        "$PYTHON" "$ROOT/scripts/installed.py" "$1" || fail "$PYTHON: the installation is not complete; see the line above"
    fi
    BIN="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
}

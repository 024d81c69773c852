#!/usr/bin/env bash
# Make the virtual environment .venv, or bring it up to date: scripts/setup.sh [test|dev]
#
# Environment: PYTHON, the interpreter to use; TORCH, what pip installs if that interpreter has no torch.
#
# Three steps: the environment with torch, the other dependencies, the project itself. Every step prints one line, and
# writes a file in .venv/.setup that says what it was made from; it is skipped as long as that holds. The output of pip
# goes to .venv/.setup/log, and its end is shown if pip fails. Torch comes first and alone, so that no package that
# depends on it pulls or replaces it.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
extra=${1:-}
venv=.venv
python=$venv/bin/python
state=$venv/.setup
busy=$state/busy
log=$state/log

say() { echo "setup: $*" >&2; }
fail() { say "$@"; exit 1; }
is_recorded() { [ "$(cat "$state/$1" 2>/dev/null)" = "$2" ]; }
record() { echo "$2" >"$state/$1"; }
finds() { "$python" -c "from importlib.util import find_spec; exit(not find_spec('$1'))" 2>/dev/null; }
imports() { "$python" -c "import $1" 2>/dev/null; }
site_packages() { "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# The mark `busy` tells the next run that this one was interrupted, because .venv may then contain half a package. If pip
# failed before it changed anything (no network, a mistake in pyproject.toml), the mark is removed.
pip_install() {
    local folder before
    folder=$(site_packages)
    before=$(ls "$folder")
    touch "$busy"
    "$python" -m pip install "$@" >"$log" 2>&1 || {
        [ "$(ls "$folder")" != "$before" ] || rm "$busy"
        tail -n 30 "$log" >&2
        fail "pip failed; the end of $log is above. You can also install missing packages into .venv by hand."
    }
    rm "$busy"
}

check_python() {
    command -v "$PYTHON" >/dev/null || fail "There is no $PYTHON. Name another: make ... PYTHON=python3.12"
    about=$("$PYTHON" -c 'import sys; print("Python %d.%d of " % sys.version_info[:2] + sys.base_prefix)') ||
        fail "$PYTHON is not a Python 3 that works. Name another: make ... PYTHON=python3.12"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "symmem needs Python 3.10 or newer; $PYTHON is $about. Name another: make ... PYTHON=python3.12"
}

create() {
    local inherited
    # If .venv is activated, PYTHON is in the folder that is removed here.
    if [ "$("$PYTHON" -c 'import sys; print(sys.prefix)')" = "$PWD/$venv" ]; then
        PYTHON=$("$PYTHON" -c 'import sys; print(sys._base_executable)')
    fi
    inherited=$("$PYTHON" scripts/inherited.py)
    say "Making $venv with $about${inherited:+, and its torch}."
    rm -rf "$python" "$venv" # python first: an environment without it is not taken for a sound one after an interrupt
    mkdir -p "$state"
    touch "$busy"
    "$PYTHON" -m venv --without-pip "$venv"
    [ -z "$inherited" ] || echo "$inherited" >"$(site_packages)/inherited.pth"
    rm "$busy"
}

install_pip() {
    touch "$busy"
    "$python" -m ensurepip --default-pip >"$log" 2>&1 || "$PYTHON" -m pip --python "$python" install pip >>"$log" 2>&1 ||
        fail "$PYTHON has neither ensurepip nor a pip that can stand in for it (Debian, Ubuntu: install python3-venv)."
    rm "$busy"
}

environment() {
    local key="$about, $TORCH, in $PWD"
    if [ -e "$busy" ]; then
        say "The last set-up did not finish: starting over."
        create
    elif [ -e "$state/environment" ] && ! is_recorded environment "$key"; then
        say "$venv was made for ($(cat "$state/environment")), but ($key) is wanted: starting over."
        create
    elif ! finds sys; then
        create
    fi
    is_recorded environment "$key" && finds pip && finds torch && return
    # A .venv that was made in another way is used too.
    mkdir -p "$state"
    imports pip || install_pip
    if ! imports torch; then
        say "Installing $TORCH. This happens once, and can take minutes."
        # shellcheck disable=SC2086 # TORCH may hold options of pip too
        pip_install $TORCH
    fi
    record environment "$key"
}

dependencies() {
    local key requirements
    key=$(cksum <pyproject.toml)
    is_recorded "dependencies-$extra" "$key" && return
    say "Installing the dependencies${extra:+ and those of the extra $extra}."
    requirements=$("$python" scripts/requirements.py "$extra")
    mapfile -t requirements <<<"$requirements"
    # pip asks no registry about packages that are installed already, so this also works without a network.
    pip_install "${requirements[@]}"
    record "dependencies-$extra" "$key"
}

project() {
    local key
    # A strict editable install is a tree of links, one per file. mypy can follow it. A new file needs a new link. The
    # version is read when the install is made.
    key=$(
        cksum pyproject.toml allocator/version.py
        find allocator backends config tools -name __pycache__ -prune -o -type f ! -name '.*' -print | sort
    )
    is_recorded project "$key" && finds symmem && return
    say "Installing symmem, editable."
    pip_install --no-deps --no-build-isolation --config-settings editable_mode=strict --editable .
    record project "$key"
}

trap 'exit 130' INT TERM # otherwise bash continues after Ctrl-C ended pip
check_python
environment
dependencies
project

#!/usr/bin/env bash
# Make the virtual environment .venv, or bring it up to date: scripts/setup.sh [test|dev]
#
# Environment: PYTHON, the interpreter to use; TORCH, what pip installs if that interpreter has no torch.
#
# Three steps: the environment with torch, the other dependencies, the project itself. Each leaves a file in
# .venv/.setup with what it was made from, and is skipped while that still holds. Torch comes first and by itself,
# so that nothing that depends on it pulls or replaces it.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
extra=${1:-}
venv=.venv
python=$venv/bin/python
state=$venv/.setup
busy=$state/busy

say() { echo "setup: $*" >&2; }
fail() { say "$@"; exit 1; }
is_recorded() { [ "$(cat "$state/$1" 2>/dev/null)" = "$2" ]; }
record() { echo "$2" >"$state/$1"; }
finds() { "$python" -c "from importlib.util import find_spec; exit(not find_spec('$1'))" 2>/dev/null; }
imports() { "$python" -c "import $1" 2>/dev/null; }
site_packages() { "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# The mark `busy` tells the next run that this one was interrupted, when .venv may hold half a package. A pip that
# failed before it changed anything (no network, a mistake in pyproject.toml) does no harm.
pip_install() {
    local folder before
    folder=$(site_packages)
    before=$(ls "$folder")
    touch "$busy"
    "$python" -m pip install "$@" || {
        [ "$(ls "$folder")" != "$before" ] || rm "$busy"
        fail "pip failed, see above. What is missing can be installed by hand into .venv."
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
    # With .venv activated, PYTHON is in the folder that is removed here.
    if [ "$("$PYTHON" -c 'import sys; print(sys.prefix)')" = "$PWD/$venv" ]; then
        PYTHON=$("$PYTHON" -c 'import sys; print(sys._base_executable)')
    fi
    inherited=$("$PYTHON" scripts/inherited.py)
    say "Making $venv with $about${inherited:+, and the torch that it has}."
    rm -rf "$python" "$venv" # in this order: without its python, what an interrupted rm leaves is not taken for sound
    mkdir -p "$state"
    touch "$busy"
    "$PYTHON" -m venv --without-pip "$venv"
    [ -z "$inherited" ] || echo "$inherited" >"$(site_packages)/inherited.pth"
    rm "$busy"
}

install_pip() {
    touch "$busy"
    "$python" -m ensurepip --default-pip >/dev/null || "$PYTHON" -m pip --python "$python" install pip ||
        fail "$PYTHON has neither ensurepip nor a pip that can stand in for it (Debian, Ubuntu: install python3-venv)."
    rm "$busy"
}

environment() {
    local key="$about, $TORCH, in $PWD"
    if [ -e "$busy" ]; then
        say "The last set-up did not finish: starting over."
        create
    elif [ -e "$state/environment" ] && ! is_recorded environment "$key"; then
        say "$venv was made for ($(cat "$state/environment")), wanted is ($key): starting over."
        create
    elif ! finds sys; then
        create
    fi
    is_recorded environment "$key" && finds pip && finds torch && return
    # A .venv that somebody made in another way is used as it is too.
    mkdir -p "$state"
    imports pip || install_pip
    if ! imports torch; then
        say "Installing $TORCH, once."
        # shellcheck disable=SC2086 # TORCH may hold options of pip too
        pip_install $TORCH
    fi
    record environment "$key"
}

dependencies() {
    local key requirements
    key=$(cksum <pyproject.toml)
    is_recorded "dependencies-$extra" "$key" && return
    say "Installing what pyproject.toml asks for${extra:+, with the extra $extra}."
    requirements=$("$python" scripts/requirements.py "$extra")
    mapfile -t requirements <<<"$requirements"
    # Of packages that are there already pip asks no registry, so that this works without a network as well.
    pip_install --quiet "${requirements[@]}"
    record "dependencies-$extra" "$key"
}

project() {
    local key
    # A strict editable install is a tree of links, one for each file: mypy can follow it, and a new file needs a new
    # link. The version is read when it is made.
    key=$(
        cksum pyproject.toml allocator/version.py
        find allocator backends config tools -name __pycache__ -prune -o -type f ! -name '.*' -print | sort
    )
    is_recorded project "$key" && finds symmem && return
    say "Installing symmem, editable."
    pip_install --quiet --no-deps --no-build-isolation --config-settings editable_mode=strict --editable .
    record project "$key"
}

trap 'exit 130' INT TERM # else bash goes on after a pip that ended by itself on Ctrl-C
check_python
environment
dependencies
project

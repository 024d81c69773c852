#!/usr/bin/env bash
# Run what depends on torch's version on several versions of torch, and write docs/validation/torch-matrix.md.
#
# Environment:
#   VERSIONS  of torch, the oldest first; "2.11.0 2.13.0 2.15.0" if it is not set.
#   VENVS     the folder with a virtual environment for each version, by its name; .venv-matrix if it is not set. What is
#             there is used as it is; what is missing is made, except for the version that .venv has already.
#   PIP_ARGS  for pip where it installs torch, such as --index-url.
#   PYTHON    makes the environments; python3 if it is not set.
# Arguments go to pytest.
#
# symmem is built once with .venv, which scripts/setup.sh makes, and lies before all else on each version's path.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra versions <<<"${VERSIONS:-2.11.0 2.13.0 2.15.0}"
VENVS=${VENVS:-.venv-matrix}
PYTHON=${PYTHON:-python3}
TESTS=(tests/compile tests/ops/test_registry.py)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "test-matrix: $*" >&2; }
has_torch() { [ "$("$1" -c 'import torch; print(torch.__version__.partition("+")[0])' 2>/dev/null)" = "$2" ]; }

build() {
    mkdir "$work/source"
    cp -r pyproject.toml README.md LICENSE allocator backends config tools "$work/source"
    .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --target "$work/site" "$work/source"
}

make_environment() {
    local python=$VENVS/$1/bin/python requirements
    say "Making $VENVS/$1."
    rm -rf "${VENVS:?}/$1"
    "$PYTHON" -m venv "$VENVS/$1"
    # shellcheck disable=SC2086 # several options
    "$python" -m pip install --quiet ${PIP_ARGS:-} "torch==$1"
    requirements=$("$python" scripts/requirements.py test)
    mapfile -t requirements <<<"$requirements"
    "$python" -m pip install --quiet "${requirements[@]}"
}

python_of() {
    local python=$VENVS/$1/bin/python
    if [ -e "$python" ]; then
        echo "$python"
    elif has_torch .venv/bin/python "$1"; then
        echo .venv/bin/python
    else
        make_environment "$1" >&2
        echo "$python"
    fi
}

failed=0
build
for version in "${versions[@]}"; do
    python=$(python_of "$version")
    has_torch "$python" "$version" || { say "$python has another torch than $version"; exit 1; }
    say "torch $version: ${TESTS[*]}"
    PYTHONPATH=$work/site "$python" -m pytest -p no:cacheprovider --junitxml "$work/$version.xml" "${TESTS[@]}" "$@" ||
        failed=1
    PYTHONPATH=$work/site "$python" scripts/matrix.py facts >"$work/$version.json"
done
.venv/bin/python scripts/matrix.py report "$work" "${TESTS[*]}${*:+ ${*@Q}}" >docs/validation/torch-matrix.md
say "See docs/validation/torch-matrix.md."
exit "$failed"

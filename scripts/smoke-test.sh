#!/usr/bin/env bash
# Install a built wheel or source distribution into a new environment, and use it outside of the checkout:
# scripts/smoke-test.sh FILE
#
# Environment: PYTHON, the interpreter (default python3); TORCH, what pip installs first if PYTHON has no torch.
set -euo pipefail

[ $# = 1 ] || { echo "usage: scripts/smoke-test.sh FILE, one wheel or source distribution" >&2; exit 2; }
file=$(realpath "$1")
inherited=$(cd "$(dirname "$0")/.." && "${PYTHON:-python3}" scripts/inherited.py)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

"${PYTHON:-python3}" -m venv venv
python=$work/venv/bin/python
if [ -n "$inherited" ]; then
    echo "$inherited" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/inherited.pth"
else
    # shellcheck disable=SC2086 # TORCH may hold options of pip too
    "$python" -m pip install --quiet ${TORCH:-torch==2.13.0}
fi
"$python" -m pip install --quiet "setuptools>=77" PyYAML
"$python" -m pip install --quiet --no-build-isolation "$file"

"$python" -c "import symmem, sys; assert symmem.__file__.startswith(sys.prefix), symmem.__file__"
venv/bin/symmem doctor
venv/bin/symmem demo --ranks 2
"$python" - <<'PROGRAM'
from symmem.tools.conformance import CASES

assert len(CASES) > 50, len(CASES)
print(f"The installed conformance suite has {len(CASES)} cases.")
PROGRAM

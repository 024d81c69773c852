"""Print the packages that pip must install before symmem, except torch, one requirement per line.

The list has the dependencies of symmem, the requirements of its build, and those of one extra.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def main(extra: str) -> None:
    """Print the requirements of pyproject.toml with one of its extras, or with none if ``extra`` is empty."""
    pyproject = tomllib.loads(Path("pyproject.toml").read_text())
    project = pyproject["project"]

    def of_extra(name: str) -> list[str]:
        found = []
        for requirement in project["optional-dependencies"][name]:
            own = re.fullmatch(r"symmem\[(\w+)\]", requirement)
            found += of_extra(own[1]) if own else [requirement]
        return found

    # Older versions of pip do not know --config-settings, or build differently if there is no wheel.
    wanted = ["pip>=23.1", *pyproject["build-system"]["requires"], *project["dependencies"]]
    if extra:
        wanted += of_extra(extra)
    print(*(requirement for requirement in wanted if not re.match(r"torch\b", requirement)), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])

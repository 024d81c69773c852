"""Print the .pth file that gives a virtual environment the packages of this interpreter, if it has a torch.

``venv --system-site-packages`` is not enough: if this interpreter belongs to a virtual environment, the new environment
would see the packages of the base interpreter instead.
"""

import os
import re
import sys
from pathlib import Path


def main() -> None:
    """Print nothing if there is no torch, or if it is too old."""
    try:
        import torch
    except ImportError:
        return
    needed = re.search(r'"torch>=(\d+)\.(\d+)"', Path("pyproject.toml").read_text())
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)  # 2.11.0a0+git, as vendors build it, counts as 2.11
    if [int(part) for part in found.groups()] < [int(part) for part in needed.groups()]:
        print(f"setup: not using the torch {torch.__version__} of {sys.executable}: too old", file=sys.stderr)
        return
    folders = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    for folder in folders:
        print(f"import site; site.addsitedir({folder!r})")


if __name__ == "__main__":
    main()

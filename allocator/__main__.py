"""``python -m symmem``: the same as the command ``symmem``."""

from __future__ import annotations

import sys

from symmem.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""What scripts/test-matrix.sh makes of its results: ``facts`` of one torch as JSON, ``report FOLDER TESTS`` of all."""

import json
import platform
import re
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from xml.etree import ElementTree


def facts() -> None:
    """Print what this torch is, and has."""
    import torch

    from symmem.compile import wrappers

    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "Library.register_symm_mem_args": hasattr(torch.library.Library, "register_symm_mem_args"),
    }
    for owner, name, _made in wrappers.OPTIONAL:
        found[f"{owner.__name__}.{name}"] = hasattr(owner, name)
    print(json.dumps(found))


def outcomes(file: Path) -> dict[str, tuple[str, str]]:
    """The outcome of each test of a JUnit file, and why it was skipped."""
    found = {}
    for case in ElementTree.parse(file).iter("testcase"):
        tags = {child.tag: child.get("message", "") for child in case}
        kind = next((kind for kind in ("failure", "error", "skipped") if kind in tags), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = kind, tags.get("skipped", "")
    return found


def report(folder: Path, tests: str) -> None:
    """Print the table, and in what the versions differ."""
    order = sorted(folder.glob("*.xml"), key=lambda file: [int(part) for part in re.findall(r"\d+", file.stem)])
    known = {file.stem: json.loads(file.with_suffix(".json").read_text()) for file in order}
    results = {file.stem: outcomes(file) for file in order}
    print("# Versions of torch\n")
    print(f"`make test-matrix`, {date.today()}, {platform.system()} {platform.machine()}: `pytest {tests.strip()}`.\n")
    print("| torch | Python | passed | failed | skipped |\n| --- | --- | --- | --- | --- |")
    for version, fact in known.items():
        count = Counter(kind for kind, _why in results[version].values())
        failed = count["failure"] + count["error"]
        print(f"| {fact['torch']} | {fact['python']} | {count['passed']} | {failed} | {count['skipped']} |")
    print("\nWhat differs:\n")
    lines = [
        f"- `{name}`: " + ", ".join(f"{version} {'yes' if known[version][name] else 'no'}" for version in known)
        for name in list(next(iter(known.values())))[2:]
    ]
    for test in sorted({test for each in results.values() for test in each}):
        kinds = {version: " ".join(each.get(test, ("not there", ""))).strip() for version, each in results.items()}
        if len(set(kinds.values())) > 1:
            lines.append(f"- `{test}`: " + ", ".join(f"{version} {kind}" for version, kind in kinds.items()))
    print("\n".join(lines or ["Nothing."]))


if __name__ == "__main__":
    if sys.argv[1] == "facts":
        facts()
    else:
        report(Path(sys.argv[2]), sys.argv[3])

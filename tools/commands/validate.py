"""``symmem validate``: runs the conformance suite, the examples and benchmarks, and writes a report."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from symmem.backends import get_backend
from symmem.tools.bench.figures import Figure
from symmem.tools.commands.doctor import examine
from symmem.tools.conformance import CASES, Case, run_case
from symmem.tools.conformance.together import SETS, run_together
from symmem.tools.examples import EXAMPLES, run_example, why_not
from symmem.tools.ranks import RankPool, RanksFailedError
from symmem.version import VERSION

__all__ = ["Result", "conformance", "examples", "run"]

# Short timeouts, so that ranks do not wait long for a rank that failed a case.
_ENV = {"SYMMEM_ENABLE": "rendezvous_timeout(60s),signal_timeout(20s)"}


@dataclass(frozen=True)
class Result:
    """The result of one case on one backend.

    Attributes:
        backend: Name of the backend.
        world: Number of ranks.
        case: Name of the case; empty if the whole backend was skipped.
        outcome: ``passed``, ``skipped`` or ``failed``.
        why: The reason for the skip, or the error.
        seconds: Duration.
    """

    backend: str
    world: int
    case: str
    outcome: str
    why: str = ""
    seconds: float = 0.0


def conformance(backend: str, world: int) -> Iterator[Result]:
    """Run the suite on one backend, case by case."""
    finding = examine(backend)
    if not finding.available:
        yield Result(backend, world, "", "skipped", f"{finding.why_not} -> {finding.remedy}")
        return
    alone = get_backend(backend).device_type == "cuda"
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(RankPool(world, env=_ENV, timeout=120))
        for case in sorted(CASES.values(), key=lambda case: case.breaks):
            if case.breaks and alone:
                pool.close()
            if not pool.alive:
                pool = stack.enter_context(RankPool(world, env=_ENV, timeout=120))
            result = _one(pool, case, backend, world)
            if result.outcome == "failed":
                pool.close()  # its ranks may be at different steps now
            yield result


def _one(pool: RankPool, case: Case, backend: str, world: int) -> Result:
    begin = time.monotonic()
    try:
        reasons = pool.run(run_case, case.name, backend)
    except RanksFailedError as error:
        return Result(backend, world, case.name, "failed", str(error), time.monotonic() - begin)
    outcome = "skipped" if reasons[0] else "passed"
    return Result(backend, world, case.name, outcome, reasons[0] or "", time.monotonic() - begin)


def coexistence(backends: Sequence[str], world: int) -> Iterator[Result]:
    """Run the sets of backends that were all asked for and all work here, together in one process."""
    for names in SETS:
        if not set(names) <= set(backends) or not all(examine(name).available for name in names):
            continue
        begin = time.monotonic()
        label = " + ".join(names)
        try:
            with RankPool(world, env=_ENV, timeout=120) as pool:
                pool.run(run_together, names)
        except RanksFailedError as error:
            yield Result("together", world, label, "failed", str(error), time.monotonic() - begin)
        else:
            yield Result("together", world, label, "passed", "", time.monotonic() - begin)


def _figures(backends: Sequence[str], world: int) -> Iterator[Figure]:
    """Yield the figures of the suites that this machine can run."""
    if "host" in backends:
        from symmem.tools.bench import host

        yield from host.measure(min(world, 4))
    if "native" in backends and examine("native").available and world > 1:
        from symmem.tools.bench import gpu

        for peer in gpu.PEERS:
            if examine(f"pytorch_{peer}").available:
                yield from gpu.measure("native", peer, world)


def examples(folder: Path, world: int) -> Iterator[Result]:
    """Run the example programs in a folder."""
    for name in EXAMPLES:
        begin = time.monotonic()
        outcome, why = "skipped", why_not(name, cuda=torch.cuda.is_available())
        if not (folder / name).is_file():
            why = f"{folder / name} does not exist: examples are not installed; name their folder with --examples"
        if not why:
            try:
                run_example(folder / name, world, _ENV, timeout=120)
                outcome = "passed"
            except RanksFailedError as error:
                outcome, why = "failed", str(error)
        yield Result("examples", world, name, outcome, why, time.monotonic() - begin)


def _machine() -> dict[str, Any]:
    packages = {}
    for name in ("torch", "cuda-bindings", "cuda-core", "nvshmem4py-cu13", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "symmem": VERSION,
        "python": platform.python_version(),
        "packages": packages,
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": [],
    }
    with contextlib.suppress(FileNotFoundError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        machine["gpus"] = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return machine


def _markdown(machine: dict[str, Any], world: int, results: Sequence[Result], figures: Sequence[Figure]) -> str:
    """Make the report in Markdown."""
    gpus: dict[str, int] = {}
    for gpu in machine["gpus"]:
        gpus[gpu] = gpus.get(gpu, 0) + 1
    lines = [
        f"# Validation, {world} ranks",
        "",
        f"- date: {machine['date']}",
        f"- GPUs: {', '.join(f'{count} x {name}' for name, count in gpus.items()) or 'none'} (name, driver)",
        f"- CPUs: {machine['cpus']}; Python {machine['python']}; symmem {machine['symmem']}",
        f"- packages: {', '.join(f'{name} {number}' for name, number in machine['packages'].items())}",
        "",
        "## Conformance",
        "",
        "| backend | passed | skipped | failed |",
        "| --- | --- | --- | --- |",
    ]
    for backend in dict.fromkeys(result.backend for result in results):
        counts = [
            sum(r.backend == backend and r.outcome == outcome for r in results)
            for outcome in ("passed", "skipped", "failed")
        ]
        lines.append(f"| {backend} | {' | '.join(map(str, counts))} |")
    for outcome in ("skipped", "failed"):
        chosen = [result for result in results if result.outcome == outcome]
        if chosen:
            lines += ["", f"### {outcome.capitalize()}", "", "| backend | case | why |", "| --- | --- | --- |"]
            for r in chosen:
                why = (r.why.strip().splitlines() or [""])[-1 if outcome == "failed" else 0]
                lines.append(f"| {r.backend} | {r.case or 'all'} | {why.replace('|', '/')} |")
    lines += ["", "## Figures", "", "| figure | backend | bytes | symmem | peer | peer value | ratio |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for f in figures:
        theirs = "" if f.peer_value is None else f"{f.peer_value:.2f} {f.unit}"
        ratio = "" if f.ratio is None else f"{f.ratio:.3f}"
        lines.append(
            f"| {f.figure} | {f.backend} | {f.bytes} | {f.value:.2f} {f.unit} | {f.peer} | {theirs} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def _write(report: Path | None, world: int, results: Sequence[Result], figures: Sequence[Figure]) -> None:
    if report is None:
        return
    machine = _machine()
    report.mkdir(parents=True, exist_ok=True)
    (report / f"validation-{world}.md").write_text(_markdown(machine, world, results, figures))
    data = {
        "machine": machine,
        "world": world,
        "results": [asdict(result) for result in results],
        "figures": [json.loads(figure.json()) for figure in figures],
    }
    (report / f"validation-{world}.json").write_text(json.dumps(data, indent=1) + "\n")


def run(
    backends: Sequence[str],
    required: Sequence[str],
    world: int,
    report: Path | None,
    programs: Path,
    *,
    figures: bool,
) -> int:
    """Validate, print a line per case, and write ``validation-N.md`` and ``validation-N.json``.

    Args:
        backends: Names of the backends to test.
        required: Names of backends whose skipped cases count as failures.
        world: Number of ranks.
        report: Folder of the report.
        programs: Folder of the examples.
        figures: Whether to run the benchmarks.

    Returns:
        The exit code: 1 if a case or an example failed, or a required backend or one of its cases was skipped.
    """
    results: list[Result] = []
    suites = [conformance(backend, world) for backend in backends]
    for result in itertools.chain(*suites, coexistence(backends, world), examples(programs, world)):
        results.append(result)
        print(f"{result.outcome:8}{result.seconds:7.2f} s  {result.backend}: {result.case} {result.why}", flush=True)
    measured: list[Figure] = []
    _write(report, world, results, measured)  # now, because a benchmark may fail
    if figures:
        try:
            for figure in _figures(backends, world):
                measured.append(figure)
                print(figure.json(), flush=True)
        except RanksFailedError as error:
            print(error, file=sys.stderr)
            results.append(Result("figures", world, f"after {len(measured)} figures", "failed", str(error)))
        _write(report, world, results, measured)
    bad = [r for r in results if r.outcome == "failed" or (r.outcome == "skipped" and r.backend in required)]
    counts = {outcome: sum(r.outcome == outcome for r in results) for outcome in ("passed", "failed", "skipped")}
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    for result in bad:
        print(f"{result.outcome}: {result.backend} {result.case}", file=sys.stderr)
    return 1 if bad else 0

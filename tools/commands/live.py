"""``symmem top``, ``symmem inspect`` and ``symmem dump``: look at the ranks that run on this host."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from symmem.errors import InvalidArgumentError
from symmem.service.socket_paths import PARTS
from symmem.tools.commands.subcommands import SubParsers, number
from symmem.tools.table import render

if TYPE_CHECKING:
    from symmem.tools.live.processes import Process

__all__ = ["add_parsers"]


def add_parsers(subparsers: SubParsers) -> None:
    """Add the three commands."""
    seconds = number(0.05, 3600, "seconds from 0.05 to 3600")
    top = subparsers.add_parser("top", help="show the ranks on this host and their waits, in a live table")
    top.add_argument("--once", action="store_true", help="print the table once")
    interval = "seconds between two updates (default 1)"
    top.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS", help=interval)
    top.set_defaults(run=_top)

    inspect = subparsers.add_parser("inspect", help="list the live tensors of the ranks on this host")
    inspect.add_argument("--json", action="store_true", help="print the full answer of every process as JSON")
    parts = f"parts to ask for with --json, comma-separated, of {', '.join(PARTS)} (default groups,tensors)"
    inspect.add_argument("--parts", type=_parts, default=["groups", "tensors"], metavar="PARTS", help=parts)
    folder = "write the memory snapshot of every process to DIR, for `symmem memory-map`"
    inspect.add_argument("--snapshots", type=Path, metavar="DIR", help=folder)
    inspect.set_defaults(run=_inspect)

    dump = subparsers.add_parser("dump", help="explain a job that hangs: which rank waits for which, and Python stacks")
    output = "write the answers of all processes there, as JSON (default symmem-dump.json)"
    dump.add_argument("-o", "--output", type=Path, default=Path("symmem-dump.json"), metavar="PATH", help=output)
    dump.set_defaults(run=_dump)

    for parser in (top, inspect, dump):
        parser.add_argument("--job", metavar="ID", help="only the ranks of this job")
    for parser in (inspect, dump):
        limit = "time that a process has to answer (default 10)"
        parser.add_argument("--timeout", type=seconds, default=10.0, metavar="SECONDS", help=limit)


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    return parts


def _top(args: argparse.Namespace) -> int:
    from symmem.tools.live import top

    return top.run(args.job, args.interval, args.once)


def _dump(args: argparse.Namespace) -> int:
    from symmem.tools.live import dump

    return dump.run(args.job, args.output, args.timeout)


def _inspect(args: argparse.Namespace) -> int:
    from symmem.tools.live.processes import ask_all

    if args.snapshots:
        return _write(ask_all(["snapshot"], args.job, args.timeout), args.snapshots)
    found = ask_all(args.parts if args.json else ["tensors"], args.job, args.timeout)
    if args.json:
        answers = [each.answer or {"job": each.job, "pid": each.pid, "problem": each.problem} for each in found]
        print(json.dumps(answers, indent=2))
    else:
        from symmem.tools.live.top import printable

        print(printable(_table(found)))
    return 1 if any(each.problem for each in found) else 0


def _table(found: list[Process]) -> str:
    """A table of live tensors. Equal tensors of a process share a line."""
    counts: dict[tuple[object, ...], int] = {}
    notes = []
    for process in found:
        for each in process.answer["tensors"] if process.answer else ():
            shape = f"{each['dtype']} {each['shape']}"
            place = each["group"] or ", ".join(each["groups"]) or "-", each["backend"], each["site"] or "-"
            row = process.job, str(process), each["name"] or "-", shape, each["nbytes"], *place
            counts[row] = counts.get(row, 0) + 1
        if process.answer is None:
            notes.append(f"{process} {process.problem}")
        elif left_out := process.answer["tensors_left_out"]:
            notes.append(f"{process}: {left_out} more tensors are not shown")
    header = ("job", "process", "number", "name", "tensor", "bytes", "group", "backend", "allocated at")
    rows = [(*row[:2], count, *row[2:]) for row, count in counts.items()]
    return "\n".join([render(header, rows), *notes])


def _write(found: list[Process], folder: Path) -> int:
    """Write snapshots; returns the exit code.

    Raises:
        InvalidArgumentError: A file cannot be written.
    """
    for process in found:
        if process.answer is None:
            print(f"{process} {process.problem}")
            continue
        path = folder / f"snapshot-{process.pid}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(process.answer["snapshot"]) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidArgumentError(f"{path}: cannot be written: {error.strerror}") from error
        print(f"{path}: {process}")
    return 1 if any(process.problem for process in found) else 0

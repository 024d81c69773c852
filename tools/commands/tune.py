"""``symmem tune``: measures the kernels of the collective operators on this machine, and writes a kernel table."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from symmem.config.kernel_tables import KERNELS, Row
from symmem.config.kinds import SIZE
from symmem.config.values import InvalidValue
from symmem.errors import InvalidArgumentError, UnsupportedError
from symmem.tools.bench.figures import Figure
from symmem.tools.commands.subcommands import SubParsers
from symmem.tools.table import render
from symmem.tools.tuning import RowChange, changes, check_output, rows_from, search, write
from symmem.version import VERSION

__all__ = ["add_parser"]

_TIMEOUT = 600.0  # seconds for all rows of one size


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``tune``."""
    parser = subparsers.add_parser("tune", help="find the fastest collective kernels on these GPUs, and write a table")
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks (default: all GPUs)")
    output = "the table to write; its other rows stay (default algorithms.yaml)"
    parser.add_argument("-o", "--output", type=Path, default="algorithms.yaml", metavar="PATH", help=output)
    operations = f"operations to tune (default all: {', '.join(KERNELS)})"
    parser.add_argument("--operations", nargs="+", choices=tuple(KERNELS), default=tuple(KERNELS), help=operations)
    parser.add_argument("--least", type=_size, default="2KiB", metavar="SIZE", help="smallest size (default 2KiB)")
    parser.add_argument("--most", type=_size, default="64MiB", metavar="SIZE", help="largest size (default 64MiB)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per figure, each on its line")
    parser.set_defaults(run=_run)


def _size(text: str) -> int:
    try:
        size = SIZE.parse([text])
    except InvalidValue as bad:
        raise argparse.ArgumentTypeError(f"{bad.what}: {bad.hint}") from None
    if size & (size - 1) or size < 16:
        raise argparse.ArgumentTypeError(f"expected a power of two from 16 bytes, got {text!r}")
    return size


def _run(args: argparse.Namespace) -> int:
    """Measure, write the table, and print the changes from the built-in table.

    Raises:
        InvalidArgumentError: There is no size between ``--least`` and ``--most``.
        UnsupportedError: This machine has fewer than two GPUs, or fewer GPUs than ranks.
        ConfigError: The file exists and is no table, or its folder does not exist.
    """
    import torch

    from symmem.ops.engines.cuda_tuning import built_in
    from symmem.tools.bench.kernel_times import kernel_times
    from symmem.tools.bench.timing import slowest
    from symmem.tools.ranks import RankPool

    sizes = [1 << power for power in range(args.least.bit_length() - 1, args.most.bit_length())]
    if not sizes:
        raise InvalidArgumentError(f"--least {args.least} bytes is more than --most {args.most} bytes")
    gpus = torch.cuda.device_count()
    world = gpus if args.ranks is None else args.ranks
    if not 2 <= world <= gpus:
        raise UnsupportedError(
            f"`symmem tune` measures CUDA kernels: it needs at least two ranks and a GPU for each, not {world} ranks "
            f"on {gpus} GPUs",
            hint="run it on a machine like the ones that will use the table",
        )
    check_output(args.output)
    known, rows, found = built_in(world)._asdict(), dict[str, Sequence[Row]](), dict[str, Sequence[RowChange]]()
    with RankPool(world, timeout=_TIMEOUT) as pool:
        for name in args.operations:
            times = search(name, world, known[name], sizes, lambda *work: slowest(pool.run(kernel_times, *work)))
            rows[name] = rows_from(times)
            found[name] = changes(times, world, known[name], rows[name])
        machine = pool.run(_machine)[0]
    about = f"{', '.join(args.operations)} of {world} ranks, measured {datetime.date.today().isoformat()}"
    write(args.output, rows, world, [about, f"symmem {VERSION}, torch {torch.__version__}", *machine])
    print(_as_json(found, world) if args.json else _as_table(found, args.output))
    return 0


def _machine() -> list[str]:
    """Lines about the machine of this rank."""
    import torch

    driver = Path("/proc/driver/nvidia/version")
    return [torch.cuda.get_device_name(), driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"]


def _as_json(found: Mapping[str, Sequence[RowChange]], world: int) -> str:
    return "\n".join(
        Figure(f"tune_{name}", "native", world, nbytes, after * 1e6, "us", "built_in", before * 1e6).json()
        for name, changed in found.items()
        for nbytes, _, _, before, after in changed
    )


def _as_table(found: Mapping[str, Sequence[RowChange]], output: Path) -> str:
    lines = [
        (name, nbytes, _text(old), f"{before * 1e6:.2f}", _text(new), f"{after * 1e6:.2f}", f"{after / before:.3f}")
        for name, changed in found.items()
        for nbytes, old, new, before, after in changed
    ]
    table = render(("operation", "bytes", "built-in", "us", "tuned", "us", "ratio"), lines)
    return f"{table}\n\nwrote {output}; set SYMMEM_ENABLE='algorithms({output.absolute()})' on all ranks to use it"


def _text(row: Row) -> str:
    return f"{row.kernel} {row.blocks} x {row.threads}"

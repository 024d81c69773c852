"""The suites of ``symmem bench``: measurement, with clocks of the tests, and output."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import TASK

from symmem.errors import ConfigError
from symmem.tools import cli
from symmem.tools.bench import collectives, contenders, p2p, plot
from symmem.tools.bench.compare import read
from symmem.tools.bench.contenders import Contender
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.panels import Bars, Curves, Map, panels
from symmem.tools.bench.progress import Progress
from symmem.tools.bench.tables import table
from symmem.tools.bench.timing import HostClock, Times, in_turns, pinned
from symmem.tools.commands.bench import SUITES
from symmem.tools.ranks import RankPool, RanksFailedError

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout=TASK) as made:
        yield made


# Clocks. On the clock of these tests, a call takes two seconds on the device and one on the host.


class CountingClock(HostClock):
    """Counts calls, and logs its methods in order."""

    graphs = True

    def __init__(self) -> None:
        self.calls = 0
        self.log: list[Any] = []

    def together(self) -> None:
        self.log.append("together")
        super().all_here()

    def seconds(self, run: Callable[[], object]) -> Times:
        before = self.calls
        run()
        self.log.append(f"timed {'many' if self.calls - before > 1 else self.calls - before}")
        return Times(2.0 * (self.calls - before), 1.0 * (self.calls - before))

    def capture(self, call: Callable[[], object], count: int) -> Callable[[], object]:
        self.log.append(f"captured {count}")
        return lambda: [call() for _ in range(count)]

    def counted(self, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            self.calls += 1
            return call()

        return run


def counted_contenders(clock: CountingClock, operator: str) -> list[Contender]:
    found = contenders.contenders(operator, 1024, "host", 1024)
    return [Contender(each.name, each.source, clock.counted(each.call), each.out) for each in found]


def sampled(operator: str) -> tuple[collectives.Samples, list[str]]:
    clock = CountingClock()
    return collectives.sample(operator, counted_contenders(clock, operator), clock, rounds=2), clock.log


def test_a_clock_with_graphs_gives_three_times_of_each_call(pool: RankPool) -> None:
    for samples, log in pool.run(sampled, "all_reduce"):
        expected = {"_eager": 2.0, "_host": 1.0, "_graph": 2.0}
        assert samples == {
            (ending, name): [seconds] * 2 for ending, seconds in expected.items() for name in ("symmem", "gloo")
        }
        # All graphs are captured, then replayed in turns by all ranks together; the first replay does not count.
        assert log[-14:] == ["captured 20"] * 2 + ["together", "timed many"] * 6


def checked(operator: str) -> list[str]:
    found = contenders.contenders(operator, 4096, "host", 4096)
    for each in found:
        contenders.check(operator, each)
        assert not each.source.any()
    return [each.name for each in found]


@pytest.mark.parametrize("operator", contenders.OPERATORS)
def test_ours_and_gloo_do_what_float64_says(operator: str, pool: RankPool) -> None:
    assert pool.run(checked, operator) == [["symmem", "gloo"]] * 2


def check_one_that_is_wrong(operator: str) -> str:
    """Make rank 1's last element wrong, and return the error of every rank."""
    _, gloo = contenders.contenders(operator, 4096, "host", 4096)

    def call() -> None:
        gloo.call()
        gloo.out.view(-1)[-1] += dist.get_rank()

    try:
        contenders.check(operator, Contender("odd", gloo.source, call, gloo.out))
    except contenders.WrongResultError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("operator", contenders.OPERATORS)
def test_a_wrong_result_is_found(operator: str, pool: RankPool) -> None:
    right, wrong = pool.run(check_one_that_is_wrong, operator)
    assert right == ""
    assert f"odd's {operator} of " in wrong
    assert "1 of " in wrong


def sample_one_that_is_wrong() -> tuple[str, list[str]]:
    clock = CountingClock()
    ours, _ = counted_contenders(clock, "all_reduce")
    try:
        collectives.sample("all_reduce", [Contender("odd", ours.source, ours.source.zero_, ours.out)], clock)
    except contenders.WrongResultError as error:
        return str(error), clock.log
    return "", clock.log


def test_the_check_comes_before_the_clock(pool: RankPool) -> None:
    for error, log in pool.run(sample_one_that_is_wrong):
        assert "odd's all_reduce of 1024 bytes has " in error
        assert log == []


def line_up(operator: str, elements: int) -> list[tuple[Any, ...]]:
    memories = {name: torch.ones(elements, dtype=torch.bfloat16) for name in ("symmem", *contenders._TORCH, "nccl")}
    found = contenders.line_up(operator, memories)
    for each in found:
        assert each.source.data_ptr() == memories[each.name].data_ptr()  # where peers can access it
        assert not each.source.any()
    return [(each.name, tuple(each.source.shape), each.out is each.source) for each in found]


def test_torchs_two_shot_is_left_out_where_it_cannot_be(pool: RankPool) -> None:
    for elements, names in (
        (32, ["symmem", "torch_one_shot", "torch_two_shot", "nccl"]),
        (24, ["symmem", "torch_one_shot", "nccl"]),
    ):
        assert pool.run(line_up, "all_reduce", elements) == [[(name, (elements,), True) for name in names]] * 2


def test_sums_of_the_patterns_are_exact_in_bfloat16() -> None:
    for world in (2, 8, 64):
        like = torch.empty(4096)
        total = contenders.expected("all_reduce", 0, world, like)
        assert torch.equal(total.bfloat16().double(), total)
        assert len({tuple(contenders._pattern(rank, like, world).tolist()) for rank in range(min(world, 8))}) > 1


def test_of_all_ranks_the_slowest_counts_in_each_round() -> None:
    merged = collectives.merged([{("_eager", "nccl"): [1.0, 5.0, 1.0]}, {("_eager", "nccl"): [4.0, 2.0, 3.0]}])
    assert merged == {"_eager": {"nccl": 4.0}}


@pytest.mark.parametrize(("cpus", "world"), [(1, 4), (2, 4), (6, 4), (32, 8)])
def test_ranks_are_pinned_to_different_cpus_if_there_are_enough(
    cpus: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(10, 10 + cpus)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, chosen: seen.append(chosen))
    for rank in range(world):
        with pinned(rank, world):
            pass
    assert len(set.union(*seen[::2])) == min(cpus, world)
    assert all(len(each) == 1 for each in seen[::2])
    assert seen[1::2] == [set(range(10, 10 + cpus))] * world


def test_turns_begin_with_each() -> None:
    log: list[str] = []
    taken = in_turns([lambda: log.append("a"), lambda: log.append("b"), lambda: log.append("c")], 3)
    assert "".join(log) == "abcbcacab"
    assert [len(each) for each in taken] == [3, 3, 3]


def test_the_backend_that_is_measured_is_configured_and_other_options_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYMMEM_ENABLE", raising=False)
    assert collectives.with_backend("native") == "symmetric_memory_backend(native)"
    monkeypatch.setenv("SYMMEM_ENABLE", "symmetric_memory_backend(host, native), multicast(off)")
    assert collectives.with_backend("native") == "multicast(off), symmetric_memory_backend(native)"
    monkeypatch.setenv("SYMMEM_ENABLE", "multicats(off)")
    with pytest.raises(ConfigError, match="multicats"):
        collectives.with_backend("native")


class WatchingClock(HostClock):
    """Logs start and end of every timing, and the value of ``own`` then."""

    def __init__(self, own: torch.Tensor) -> None:
        self.own = own
        self.spans: list[tuple[float, float]] = []
        self.seen: list[float] = []

    def seconds(self, run: Callable[[], object]) -> Times:
        begin = time.monotonic()
        super().seconds(run)
        self.spans.append((begin, time.monotonic()))
        self.seen.append(self.own[0].item())
        return Times(1.0, 1.0)


def copied() -> tuple[p2p.Copies, list[tuple[float, float]], list[float]]:
    """Copy so much that ranks overlap visibly if they do not wait for each other."""
    rank = dist.get_rank()
    own, mine, theirs = (torch.full((1 << 20,), value) for value in (float(rank), 7.0, 9.0))
    clock, asked = WatchingClock(own), []

    def memory(of: torch.Tensor, peer: int) -> torch.Tensor:
        asked.append(peer)
        return of

    dist.barrier()
    found = p2p.copies(partial(memory, mine), partial(memory, theirs), own, clock, repeats=4, rounds=1)
    assert set(asked) == {1 - rank}
    assert torch.equal(mine, own)
    assert torch.equal(theirs, own)
    return found, clock.spans, clock.seen


def test_pairs_copy_alone_and_then_all_at_once(pool: RankPool) -> None:
    (first, one, seen), (second, other, also) = pool.run(copied)
    names = [f"p2p_{direction}_{when}" for when in ("alone", "together") for direction in ("pull", "push")]
    assert first == {(name, 1): (0.25, 0.25) for name in names}
    assert second == {(name, 0): (0.25, 0.25) for name in names}
    assert seen[:8] == also[:8] == [7.0, 9.0, 9.0, 7.0, *[7.0] * 4]  # a pull from ours, from theirs, ...; then pushes
    alone = len(one) // 2
    assert max(end for _, end in one[:alone]) <= min(begin for begin, _ in other[:alone])
    assert max(end for _, end in other[:alone]) <= min(begin for begin, _ in one[alone:])


# The command.


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_takes_its_options(name: str) -> None:
    flags = {option.arguments.get("dest", option.flag[2:].replace("-", "_")) for option in SUITES[name].options}
    taken = inspect.signature(importlib.import_module(f"symmem.tools.bench.{name}").run).parameters
    assert {*flags, "progress"} == {*taken}


@pytest.mark.ranks
def test_p2p_prints_figures_that_compare_reads(tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["bench", "p2p", "--ranks", "2", "--bytes", "4096", "--json"]) == 0
    file = tmp_path / "p2p.json"
    file.write_text(capsys.readouterr().out)
    figures = read(file)
    names = [
        f"p2p_{way}_{when}/{a}/{1 - a}" for when in ("alone", "together") for way in ("pull", "push") for a in (0, 1)
    ]
    assert [each.figure for each in figures] == names
    assert all(each.value > 0 and each.peer == "local" and each.bytes == 4096 for each in figures)


@pytest.mark.ranks
@pytest.mark.parametrize(("suite", "figure"), [("collectives", "broadcast"), ("process_group", "dist_broadcast")])
def test_collectives_print_a_table(suite: str, figure: str, capsys: Output) -> None:
    words = ["--ranks", "2", "--sizes", "1024", "4096", "--operators", "broadcast"]
    assert cli.main(["bench", suite, *words]) == 0
    header, _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["figure", "backend", "world", "bytes", "ours", "peers", "ratio"]
    assert [row[:4] for row in rows] == [[figure, "host", "2", nbytes] for nbytes in ("1024", "4096")]
    assert [row[6] for row in rows] == ["gloo"] * 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["p2p", "--ranks", "1"], "InvalidArgumentError: `bench p2p` needs two ranks at least, not 1"),
        (["p2p", "--backend", "native"], "UnsupportedError: `bench p2p` needs two GPUs and two ranks at least, not 0"),
        (
            ["collectives", "--backend", "native", "--ranks", "2"],
            "UnsupportedError: `bench collectives` needs two GPUs",
        ),
        (["process_group", "--backend", "native"], "UnsupportedError: `bench process_group` needs two GPUs"),
        (["collectives", "--ranks", "4", "--sizes", "32"], "InvalidArgumentError: 32 bytes among 4 ranks: expected"),
        (["collectives", "--ranks", "2", "--sizes", "100"], "expected a multiple of 16 from 32"),
        (["alloc", "--peers", "cuda"], "UnsupportedError: `bench alloc`: PyTorch's transports are for CUDA"),
        (["alloc", "--backend", "native"], "UnsupportedError: `bench alloc` needs two GPUs"),
        (["p2p", "--backend", "hots"], "ConfigError: unknown backend 'hots'"),
        (["p2p", "--plot", "picture.svg"], "InvalidArgumentError: picture.svg: pictures are PNG"),
        (["p2p", "--plot", "no/such/folder/a.png"], "there is no folder 'no/such/folder'"),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(
    words: list[str], error: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("symmem.tools.ranks.RankPool.__init__", None)  # fails if a pool is made
    assert cli.main(["bench", *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert error in err


def test_a_picture_needs_matplotlib_before_anything_is_measured(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("symmem.tools.ranks.RankPool.__init__", None)
    assert cli.main(["bench", "p2p", "--plot", str(tmp_path / "a.png")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("symmem: UnsupportedError: no picture without matplotlib")
    assert "pip install matplotlib" in err


def test_what_was_measured_before_a_failure_is_printed(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: object) -> Iterator[Figure]:
        yield BARRIER
        raise RanksFailedError([])

    monkeypatch.setattr(p2p, "run", run)
    assert cli.main(["bench", "p2p", "--json"]) == 1
    assert capsys.readouterr().out == f"{BARRIER.json()}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_current_step_in_one_line(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(progress: Progress, **options: object) -> Iterator[Figure]:
        progress.step("first")
        yield BARRIER
        progress.step("second" * 99)
        raise KeyboardInterrupt

    monkeypatch.setattr(p2p, "run", run)
    monkeypatch.setenv("COLUMNS", "30")
    for term, expected in (
        ("xterm", ["", "p2p, 0 s: first", "", ("p2p, 0 s: " + "second" * 99)[:29], "symmem: interrupted\n"]),
        ("dumb", ["symmem: interrupted\n"]),
    ):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr("sys.stderr", Terminal())
        assert cli.main(["bench", "p2p", "--json"]) == 130
        assert sys.stderr.getvalue().split("\r\x1b[K") == expected  # type: ignore[union-attr]
        assert capsys.readouterr().out == f"{BARRIER.json()}\n"


def test_figures_of_a_file_are_shown(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "old.json"
    drawn: list[Any] = []
    file.write_text(f"{BARRIER.json()}\n")
    monkeypatch.setattr(plot, "check", drawn.append)
    monkeypatch.setattr(plot, "draw", lambda *what: drawn.append(what))
    assert cli.main(["bench", "show", str(file)]) == 0
    assert capsys.readouterr().out == table([BARRIER]) + "\n"
    assert drawn == []
    assert cli.main(["bench", "show", str(file), "--plot", "a.png"]) == 0
    assert drawn == [Path("a.png"), ([BARRIER], "old", Path("a.png"))]


# Output.

BARRIER = Figure("barrier", "host", 2, 0, 12.0, "us", "gloo", 300.0)


def reduced(nbytes: int, ours: float, peers: dict[str, float], world: int = 8) -> list[Figure]:
    return [Figure("all_reduce_graph", "native", world, nbytes, ours, "us", *peer) for peer in peers.items()]


CURVE = reduced(8192, 5.0, {"nccl": 16.0, "torch_two_shot": 10.0}) + reduced(2048, 4.0, {"nccl": 15.0})
PAIRS = [Figure(f"p2p_pull_alone/{a}/{1 - a}", "host", 2, 64, 10.0 + a, "GB/s", "local", 20.0 + a) for a in (0, 1)]
REQUESTS = [Figure("store_requests", "any", n, 0, 20 * n, "count", "line", 20 * n) for n in (2, 4, 8)]


def test_sizes_and_ranks_make_curves() -> None:
    curve, ranks = panels(CURVE + REQUESTS)
    assert curve == Curves(
        "all_reduce_graph, native, 8 ranks",
        "us",
        "bytes",
        {
            "symmem": [(2048, 4.0), (8192, 5.0)],
            "nccl": [(2048, 15.0), (8192, 16.0)],
            "torch_two_shot": [(8192, 10.0)],
        },
        [(2048, 4 / 15), (8192, 0.5)],
    )
    assert isinstance(ranks, Curves)
    assert (ranks.title, ranks.axis) == ("store_requests, any", "ranks")
    assert ranks.lines["symmem"] == [(2, 40), (4, 80), (8, 160)]


def test_worlds_and_units_are_kept_apart() -> None:
    found = panels([*CURVE, *reduced(2048, 1.0, {"nccl": 2.0}, 2), *reduced(8192, 3.0, {"nccl": 6.0}, 2)])
    assert [panel.title for panel in found if isinstance(panel, Curves)] == [
        "all_reduce_graph, native, 8 ranks",
        "all_reduce_graph, native, 2 ranks",
    ]


def test_one_thing_that_was_measured_twice_is_drawn_at_the_median() -> None:
    again = [Figure("rendezvous", "native", 2, n, ours, "us", "nccl", 9.0) for n in (64, 128) for ours in (1.0, 3.0)]
    (curve,) = panels(again)
    assert isinstance(curve, Curves)
    assert curve.lines["symmem"] == [(64, 2.0), (128, 2.0)]


def test_pairs_make_maps_ours_before_the_peers() -> None:
    more = [Figure(f.figure.replace("pull", "push"), *list(vars(f).values())[1:]) for f in PAIRS]
    assert panels(PAIRS + more) == [
        Map(f"p2p_{way}_alone", "host, 2 ranks", who, "GB/s", [[None, value], [value + 1, None]])
        for who, value in (("symmem", 10.0), ("local", 20.0))
        for way in ("pull", "push")
    ]


def test_the_rest_makes_bars_by_unit() -> None:
    count = Figure("reclaim_rounds", "host", 2, 2048, 2, "count")
    assert panels([BARRIER, count]) == [
        Bars("host", "us", [("barrier, 2 ranks", {"symmem": 12.0, "gloo": 300.0})]),
        Bars("host", "count", [("reclaim_rounds, 2 ranks, 2 KiB", {"symmem": 2})]),
    ]


def test_a_table_has_all_peers_in_a_row_and_pairs_as_a_matrix() -> None:
    rows, *matrices = table(CURVE + PAIRS).split("\n\n")
    first, second = (" ".join(row.split()) for row in rows.splitlines()[2:])
    assert first == "all_reduce_graph native 8 8192 5.00 us nccl 16.00, torch_two_shot 10.00 0.500 of torch_two_shot"
    assert second == "all_reduce_graph native 8 2048 4.00 us nccl 15.00 0.267"
    assert [matrix.splitlines()[0].split(":")[0] for matrix in matrices] == [
        "p2p_pull_alone, host, 2 ranks, symmem",
        "p2p_pull_alone, host, 2 ranks, local",
    ]
    assert [line.split() for line in matrices[0].splitlines()[3:]] == [["0", "-", "10.0"], ["1", "11.0", "-"]]


@pytest.mark.parametrize(
    "figures",
    [CURVE, PAIRS, REQUESTS, [BARRIER], [Figure("long_run", "host", 2, 64, value, "bytes") for value in (0, -4096)]],
)
def test_every_panel_is_drawn(figures: list[Figure], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no pictures without matplotlib: pip install matplotlib")
    file = tmp_path / "picture.png"
    plot.check(file)
    plot.draw(figures, "a title", file)
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[16:20], "big") > 500  # pixels

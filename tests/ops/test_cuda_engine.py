"""The CUDA engine without a GPU: tables, launch arguments, files, and kernels run by CPU threads."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import random
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_gpu import COMPILER, compile_kernels
from patience import LONG, TASK
from thread_ranks import make_groups, run_ranks, succeed

from symmem.backends import cuda_signals, kernel_status
from symmem.backends.kernel_status import gpu_waits
from symmem.backends.kernel_words import NBYTES
from symmem.config.kernel_tables import KERNELS as CONFIGURED
from symmem.errors import (
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
    PeerTimeoutError,
    RendezvousError,
    SymmemError,
    UnsupportedError,
)
from symmem.group.group import Group
from symmem.ops import functions as ops
from symmem.ops.engines import cuda
from symmem.ops.engines.base import Engines
from symmem.ops.engines.checked import CheckedEngine
from symmem.ops.engines.collective_kernels import (
    COMPARING,
    END,
    KERNELS,
    OPERATORS,
    SOURCE,
    STEPS,
    TYPES,
    WorkspaceLayout,
)
from symmem.ops.engines.cuda import Chunk, CudaEngine, call_type, chunks
from symmem.ops.engines.cuda_tuning import BLOCKS, OPERATIONS, Choice, Row, Table, built_in, grid
from symmem.ops.engines.select import engine_for
from symmem.redirect import cuda_pool
from symmem.tensor.tensor import SymmetricTensor
from symmem.tools.bench.kernel_times import call_of, each_row

# Tables.


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16, 64])
def test_every_size_has_a_kernel(world: int) -> None:
    table = built_in(world)
    for nbytes in (1, 16, 2 << 10, 64 << 10, 1 << 20, 8 << 20, 1 << 33):
        assert table.choose(nbytes).kernel in CONFIGURED["all_reduce"]
        assert table.choose_move(nbytes).kernel in ("exchange", "pull")
        assert table.choose_move(nbytes, True).kernel in CONFIGURED["move"]
        assert table.choose_reduce_scatter(nbytes).kernel == "reduce_scatter"


def test_the_tables_are_in_order() -> None:
    for name, table in OPERATIONS.items():
        assert {row.kernel for row in table} <= set(CONFIGURED[name])
        for before, after in itertools.pairwise(table):
            assert before.world <= after.world
            if before.world == after.world and before.nbytes and after.nbytes:
                assert before.nbytes < after.nbytes
        assert table[-1].nbytes is None
        assert not table[-1].symmetric
        # A meeting needs one thread per rank, and one flag per block.
        assert all(row.blocks <= BLOCKS and 64 <= row.threads <= 512 for row in table)


def test_small_is_one_way_and_large_is_two() -> None:
    assert built_in(8).choose(2 << 10).kernel == "one_shot"
    assert built_in(8).choose(1 << 20).kernel == "two_shot"
    assert built_in(8).choose_move(64 << 20, True).kernel == "put"


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_where_it_begins_to_matter_where_tensors_lie(world: int) -> None:
    table = built_in(world)
    most = int(table.symmetric_beyond())
    assert table.choose_move(most, True) == table.choose_move(most, False)
    assert table.choose_move(most + 1, True).kernel == "put"
    assert table._replace(move=table.move[-1:]).symmetric_beyond() == float("inf")


@pytest.mark.parametrize(("units", "blocks"), [(0, 1), (1, 1), (128, 1), (129, 2), (10**9, 64)])
def test_blocks_of_a_launch(units: int, blocks: int) -> None:
    assert grid(Choice("any", 128, 64), units) == blocks


def test_pieces_cover_everything_once() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        most, nbytes = 16 * rng.randrange(1, 300), rng.randrange(1, 20000)
        cut = chunks(nbytes, most)
        assert [piece.start for piece in cut] == [sum(p.nbytes for p in cut[:index]) for index in range(len(cut))]
        assert sum(piece.nbytes for piece in cut) == nbytes
        assert all(0 < piece.nbytes <= most for piece in cut)
        assert all(piece.nbytes % 16 == 0 for piece in cut[:-1])
    assert chunks(100, 1600) == [Chunk(0, 100)]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_nothing_of_a_workspace_overlaps(world: int) -> None:
    layout = WorkspaceLayout.make(world, 16 << 20, 8 << 20, BLOCKS)
    marks = int(layout.macros()["MARKS"])
    assert marks >= 68
    assert marks + 2 * world * 8 == layout.flags
    assert layout.flags + 4 * BLOCKS * world * 8 <= layout.landing
    assert layout.landing % 4096 == layout.slot % 512 == layout.stage % 512 == 0
    assert layout.stages == layout.landing + 2 * world * layout.slot
    assert layout.nbytes == layout.stages + 2 * layout.stage


def test_the_arguments_are_those_of_the_source() -> None:
    text = SOURCE[SOURCE.index("struct Call {") : SOURCE.index("};", SOURCE.index("struct Call {"))]
    declared = [line.split("//")[0].strip(" ;\n").split(" ", 1)[1] for line in text.splitlines()[1:] if ";" in line]
    names = [name.strip(" *").split("[")[0] for line in declared for name in line.replace("u8 *", "").split(",")]
    assert names == [name for name, _kind in call_type(3)._fields_]  # type: ignore[misc]
    assert ctypes.sizeof(call_type(8)) == 2 * 8 * 8 + 8 * 8 + 8 * 4
    assert ctypes.sizeof(call_type(64)) <= 4096


# The compiler.


def macros(world: int, dtype: torch.dtype | None = None, reduction: str = "sum") -> list[str]:
    found = WorkspaceLayout.make(world, 16 << 20, 8 << 20, BLOCKS).macros()
    if dtype is not None:
        found |= {"REDUCES": "1", f"TYPE_{TYPES[dtype]}": "1", f"OPERATOR_{OPERATORS[reduction]}": "1"}
    return [f"-D{name}={value}" for name, value in found.items()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
@pytest.mark.parametrize(
    "flags",
    [
        macros(8),
        macros(2),
        *(macros(2, dtype, "sum") for dtype in TYPES),
        macros(3, torch.bfloat16, "max"),
        [*macros(8, torch.float32), "-DTREE=1"],
    ],
    ids=lambda flags: " ".join(flags[0:1] + flags[9:]),
)
def test_nvcc_takes_the_kernels(flags: list[str], tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(SOURCE)
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-cubin", "-o", str(tmp_path / "out"), *flags, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TASK)
    assert done.returncode == 0, done.stderr


# The engine, with GPUs made of threads.


class EmulatedDriver:
    """Launches run at once, in the calling thread."""

    def __init__(self) -> None:
        self.bindings = self
        self.launched: list[tuple[Any, int, int]] = []  # number or name, blocks, threads
        self.code = 0
        self._memory = (ctypes.c_uint32 * (NBYTES // 4))()

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Any]:
        (library, number), blocks, threads = arguments[0], arguments[1], arguments[4]
        call = ctypes.c_void_p.from_address(arguments[9]).value
        self.launched.append((number, blocks, threads))
        if library is not None and library.launch(number, ctypes.c_void_p(call), blocks, threads):
            raise RuntimeError("unspecified launch failure")
        return (self.code,)

    def enter(self, ordinal: int) -> None:
        """Nothing to do."""

    def on(self, ordinal: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def fill(self, address: int, word: int, nbytes: int, stream: int) -> None:
        ctypes.memmove(address, word.to_bytes(4, "little") * (nbytes // 4), nbytes)

    def read(self, address: int, nbytes: int, stream: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def pinned(self, nbytes: int) -> tuple[int, int]:
        return ctypes.addressof(self._memory), ctypes.addressof(self._memory)


class StubGroup:
    name = "g"
    settings = SimpleNamespace(signal_timeout=20.0, algorithms="built-in")

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def lost(self) -> tuple[int, ...]:
        return ()

    def when_lost(self, function: Callable[[int], None]) -> None:
        self.lose = function

    def fail(self, operation: str, error: BaseException) -> None:
        """There are no other ranks."""


WORLD = 3
SMALL = WorkspaceLayout.make(WORLD, 3 * 4096, 3 * 2048, 8)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    stub = EmulatedDriver()
    monkeypatch.setattr(cuda_signals, "load_driver", lambda: stub)
    monkeypatch.setattr("torch._C._cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda ordinal: 70 + ordinal, raising=False)
    monkeypatch.setattr("torch._C._cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(cuda, "finish_stream", lambda device: None)  # a launch returns when the kernel does
    cuda_signals.device_of.cache_clear()
    yield stub
    cuda_signals.device_of.cache_clear()
    kernel_status.devices.clear()


def memory(nbytes: int) -> torch.Tensor:
    """Zeros at a multiple of 4096."""
    room = torch.zeros(nbytes + 4096, dtype=torch.uint8)
    return room[-room.data_ptr() % 4096 :][:nbytes]


class Ranks:
    """One engine per rank in this process. An operation runs in one thread per rank."""

    def __init__(self, groups: list[Any], layout: WorkspaceLayout) -> None:
        self.engines = [CudaEngine(group, torch.device("cuda", 0)) for group in groups]
        self.areas = [memory(layout.nbytes) for _ in groups]
        for engine, area in zip(self.engines, self.areas, strict=True):
            engine.layout, engine._areas = layout, tuple(each.data_ptr() for each in self.areas)
            engine._clear(area.data_ptr())

    def use(self, **rows: tuple[Row, ...]) -> None:
        """Let all engines use these rows, for one operation or several."""
        for engine in self.engines:
            engine.use(engine.table._replace(**rows))

    def run(self, operation: Callable[[CudaEngine, int], object]) -> list[BaseException | None]:
        errors: list[BaseException | None] = [None] * len(self.engines)

        def work(rank: int) -> None:
            try:
                operation(self.engines[rank], rank)
            except BaseException as error:
                errors[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.engines))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
            assert not thread.is_alive()
        return errors


@pytest.fixture
def kernels(driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch, libraries: dict[str, Any]) -> None:
    def program(_state: Any, kind: str, _macros: dict[str, str]) -> Any:
        functions = {name: (libraries[kind], number) for number, name in enumerate(KERNELS[kind])}
        return SimpleNamespace(functions=functions)

    monkeypatch.setattr(cuda, "program", program)
    for library in libraries.values():
        library.restart()


@pytest.fixture
def ranks(kernels: None) -> Ranks:
    return Ranks([StubGroup(rank, WORLD) for rank in range(WORLD)], SMALL)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    folder, layout = tmp_path_factory.mktemp("kernels"), SMALL.macros()
    reducing = {"REDUCES": "1", "TYPE_F32": "1", "OPERATOR_SUM": "1"}
    return {
        "reduce": compile_kernels("reduce", layout | reducing, folder),
        "move": compile_kernels("move", layout, folder),
    }


def floats(n: int, rank: int, rng: random.Random) -> torch.Tensor:
    """Random numbers at an address that is any multiple of 4 bytes."""
    start = rng.choice((0, 0, 1, 2))
    generator = torch.Generator().manual_seed(rank * 1000 + n)
    return torch.cat([torch.zeros(start), torch.randn(n, generator=generator)])[start:]


@pytest.mark.slow
def test_all_reduce_to_the_bit(ranks: Ranks) -> None:
    rng = random.Random(3)
    for turn in range(60):
        n = rng.choice((1, 2, 3, 4, 5, 63, 64, 65, 1000, 1025, 3000, 7001))
        sources = [floats(n, rank, rng) for rank in range(WORLD)]
        want = functools.reduce(torch.add, sources)
        outs = sources if rng.random() < 0.5 else [torch.empty_like(each) for each in sources]
        row = Row(WORLD, None, ("one_shot", "two_shot")[turn % 2], rng.choice((8, 16)), rng.choice((1, 3)))
        ranks.use(all_reduce=(row,))
        errors = ranks.run(lambda engine, rank, s=sources, o=outs: engine.all_reduce(s[rank], o[rank], "sum"))  # type: ignore[misc]
        assert errors == [None] * WORLD
        for out in outs:
            assert torch.equal(out.view(torch.int32), want.view(torch.int32)), (turn, n, row)
    for area in ranks.areas:  # the receiver has taken everything that was pushed
        assert (area[SMALL.landing : SMALL.stages] == 255).all()


def test_numbers_that_look_like_nothing(ranks: Ranks) -> None:
    # At rest, a word of a landing zone is 64 ones. As floats they are NaNs.
    for kernel in ("one_shot", "two_shot"):
        tensors = [torch.full((50,), -1, dtype=torch.int32).view(torch.float32) for _ in range(WORLD)]
        ranks.use(all_reduce=(Row(WORLD, None, kernel, 8, 2),))
        ranks.run(lambda engine, rank, t=tensors: engine.all_reduce(t[rank], t[rank], "sum"))  # type: ignore[misc]
        for tensor in tensors:
            assert tensor.isnan().all()
            assert torch.equal(tensor.view(torch.int32), tensors[0].view(torch.int32))


class Alternating(Table):
    """Choose by the number of bytes."""

    def choose(self, nbytes: int) -> Choice:
        return Choice("two_shot" if nbytes % 8 else "one_shot", 8, 2)

    def choose_move(self, nbytes: int, symmetric: bool = False) -> Choice:
        return Choice("pull" if nbytes % 8 else "exchange", 8, 2)


def test_a_rank_may_run_ahead(ranks: Ranks) -> None:
    rng = random.Random(4)
    sizes = [rng.choice((1, 5, 64, 500, 2000)) for _ in range(40)]
    for engine in ranks.engines:
        engine.use(Alternating(*built_in(WORLD)))

    def work(engine: CudaEngine, rank: int) -> None:
        for turn, n in enumerate(sizes):
            x = torch.arange(n, dtype=torch.float32) + rank * 100 + turn
            if turn % 4 == 0:
                root = turn // 4 % WORLD
                engine.broadcast(x, x, root)
                assert torch.equal(x, torch.arange(n) + root * 100.0 + turn)
            elif turn % 4 == 1:
                out = torch.empty(WORLD, n)
                engine.all_gather(x, out)
                assert torch.equal(out, torch.stack([torch.arange(n) + r * 100.0 + turn for r in range(WORLD)]))
            else:
                engine.all_reduce(x, x, "sum")
                assert torch.equal(x, torch.arange(n) * WORLD + 100.0 * sum(range(WORLD)) + turn * WORLD)

    assert ranks.run(work) == [None] * WORLD


@pytest.mark.parametrize("kernel", ["exchange", "pull"])
def test_bytes_move_unchanged(kernel: str, ranks: Ranks) -> None:
    ranks.use(move=(Row(WORLD, None, kernel, 8, 3),))
    rng = random.Random(5)
    for n in (1, 3, 7, 8, 9, 16, 33, 500, 2047, 2048, 7003):
        given = [torch.randint(0, 256, (WORLD, n), dtype=torch.uint8) for _ in range(WORLD)]
        given[1][:] = 255  # like landing zones at rest
        start = rng.choice((0, 1, 4))
        sources = [torch.cat([torch.zeros(start, dtype=torch.uint8), each.flatten()])[start:] for each in given]
        outs = [torch.zeros(WORLD, n, dtype=torch.uint8) for _ in range(WORLD)]
        errors = ranks.run(lambda e, rank, s=sources, o=outs, n=n: e.all_to_all(s[rank].view(WORLD, n), o[rank]))  # type: ignore[misc]
        assert errors == [None] * WORLD
        for rank, out in enumerate(outs):
            assert torch.equal(out, torch.stack([each[rank] for each in given])), n
        errors = ranks.run(lambda e, rank, s=sources, o=outs, n=n: e.all_gather(s[rank][:n], o[rank]))  # type: ignore[misc]
        assert errors == [None] * WORLD
        for out in outs:
            assert torch.equal(out, torch.stack([each[0] for each in given])), n
        for root in range(WORLD):
            received = [each[:n].clone() for each in sources]
            ranks.run(lambda e, rank, r=received, root=root: e.broadcast(r[rank], r[rank], root))  # type: ignore[misc]
            assert all(torch.equal(each, given[root][0]) for each in received), (n, root)


def test_reduce_scatter(ranks: Ranks) -> None:
    rng = random.Random(6)
    for n in (1, 3, 4, 31, 500, 1024, 2500):
        sources = [floats(WORLD * n, rank, rng).view(WORLD, n) for rank in range(WORLD)]
        outs = [torch.empty(n) for _ in range(WORLD)]
        assert ranks.run(lambda e, r, s=sources, o=outs: e.reduce_scatter(s[r], o[r], "sum")) == [None] * WORLD  # type: ignore[misc]
        for rank, out in enumerate(outs):
            assert torch.equal(out, functools.reduce(torch.add, [each[rank] for each in sources])), n


TREES = {world: WorkspaceLayout.make(world, world * 4096, world * 2048, 8) for world in (1, 2, 4)}


@pytest.fixture(scope="module")
def tree_libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The kernels with the macro TREE, by the number of ranks."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    folder = tmp_path_factory.mktemp("trees")
    reducing = {"REDUCES": "1", "TYPE_F32": "1", "OPERATOR_SUM": "1", "TREE": "1"}
    return {str(world): compile_kernels("reduce", TREES[world].macros() | reducing, folder) for world in (2, 4)}


def tree_of(leaves: torch.Tensor) -> torch.Tensor:
    half = len(leaves) // 2
    return leaves[0].float() if half == 0 else tree_of(leaves[:half]) + tree_of(leaves[half:])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["one_shot", "two_shot"])
@pytest.mark.parametrize("world", TREES)
def test_trees_have_the_same_bits_on_every_number_of_ranks(
    world: int, kernel: str, driver: EmulatedDriver, tree_libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(_state: Any, kind: str, macros: dict[str, str]) -> Any:
        assert (kind, macros["TREE"], macros["OPERATOR_SUM"], macros["TYPE_F32"]) == ("reduce", "1", "1", "1")
        library = tree_libraries[macros["WORLD"]]
        return SimpleNamespace(functions={name: (library, number) for number, name in enumerate(KERNELS[kind])})

    monkeypatch.setattr(cuda, "program", program)
    ranks = Ranks([StubGroup(rank, world) for rank in range(world)], TREES[world])
    ranks.use(all_reduce=(Row(world, None, kernel, 8, 2),))
    generator = torch.Generator().manual_seed(7)
    for dtype, reduction, n in itertools.product((torch.float32, torch.bfloat16), ("sum", "avg"), (8, 1000, 5000)):
        shape = (8, n)
        scales = 2.0 ** torch.randint(-6, 6, shape, generator=generator)
        leaves = (torch.randn(shape, generator=generator) * scales).to(dtype)
        total = tree_of(leaves)
        wanted = (total / 8 if reduction == "avg" else total).to(dtype)
        mine, before = leaves.chunk(world), leaves.clone()
        outs = [torch.empty_like(wanted) for _ in range(world)]
        errors = ranks.run(lambda e, r, m=mine, o=outs, how=reduction: e.all_reduce_tree(m[r], o[r], how))  # type: ignore[misc]
        assert errors == [None] * world
        assert all(torch.equal(out, wanted) for out in outs), (dtype, reduction, n)
        parts = [torch.empty(n // world, dtype=dtype) for _ in range(world)]
        rows = [each.unflatten(1, (world, -1)) for each in mine]
        errors = ranks.run(lambda e, r, m=rows, o=parts, how=reduction: e.reduce_scatter_tree(m[r], o[r], how))  # type: ignore[misc]
        assert errors == [None] * world
        assert torch.equal(torch.cat(parts), wanted), (dtype, reduction, n)
        assert torch.equal(leaves, before)


class StubBlock:
    closed = False


def in_symmetric_memory(ranks: Ranks, rooms: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every engine find the tensors of all ranks, at their offsets in their rooms."""
    block = StubBlock()

    def find(rank: int, address: int, nbytes: int) -> Any:
        offset = address - rooms[rank].data_ptr()
        return cuda._SymmetricOut(tuple(room.data_ptr() + offset for room in rooms), str(offset), weakref.ref(block))  # type: ignore[arg-type]

    for rank, engine in enumerate(ranks.engines):
        monkeypatch.setattr(engine, "_find_memory", functools.partial(find, rank))


@pytest.mark.parametrize("way", ["closed", "collected"])
def test_addresses_are_kept_as_long_as_the_block(way: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tensor = ranks.engines[0], torch.zeros(8)
    found: list[Any] = []
    blocks = [StubBlock()]

    def find(address: int, nbytes: int) -> Any:
        found.append(cuda._SymmetricOut((len(found),) * WORLD, "", weakref.ref(blocks[-1])))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(engine, "_find_memory", find)
    assert engine._memory(tensor) is engine._memory(tensor) is found[0]
    blocks[0].closed = way == "closed"
    blocks.append(StubBlock())  # at the same address
    if way == "collected":
        del blocks[0]
    assert engine._memory(tensor) is found[1]
    assert len(found) == 2


def test_which_memory_is_that_of_all_ranks(driver: EmulatedDriver) -> None:
    (group,) = make_groups(1, name="memories")
    engine = CudaEngine(group, torch.device("cuda", 0))

    def allocate(**options: Any) -> SymmetricTensor:
        return SymmetricTensor.allocate((4096,), torch.uint8, group=group, backend="host", **options)

    def place(tensor: torch.Tensor) -> str:
        found = engine._find_memory(tensor.data_ptr(), tensor.nbytes)
        assert found is not None
        assert found.outs == (tensor.data_ptr(),)
        return found.place

    apart = [allocate(arena=False) for _ in range(2)]  # both begin at the start of their allocations
    assert engine._memory(apart[0].tensor) is None  # not rendezvoused
    for each in apart:
        each.rendezvous(group)
    from_arena = allocate()
    tensors = [each.tensor for each in (*apart, from_arena)]
    places = [part for each in tensors for part in (each, each[2048:])]
    assert len({place(part) for part in places}) == len(places)
    assert place(tensors[0]) == place(tensors[0].view(64, 64))
    assert engine._memory(tensors[0][8:]) is None
    assert engine._find_memory(from_arena.tensor.data_ptr(), 4097) is None
    # In torch's allocator, the addresses of tensors depend on when the garbage collector runs.
    cuda_pool._pooled.add(from_arena._block)
    assert engine._memory(from_arena.tensor) is None
    apart[0].close()
    assert engine._memory(tensors[0]) is None


Operation = Callable[[CudaEngine, torch.Tensor, torch.Tensor], None]


def run_with_a_slow_rank(
    ranks: Ranks, operation: Operation, sources: list[torch.Tensor], outs: list[torch.Tensor], slow: int
) -> list[torch.Tensor]:
    """Every rank's memory when its own kernel ends. Before its kernel and after it, a rank's memory is its own."""
    seen = [torch.empty(0)] * WORLD

    def work(engine: CudaEngine, rank: int) -> None:
        if rank == slow:
            time.sleep(0.002)
        if outs[rank] is not sources[rank]:
            outs[rank].fill_(-2)
        operation(engine, sources[rank], outs[rank])
        seen[rank] = outs[rank].clone()
        sources[rank].fill_(-1)

    assert ranks.run(work) == [None] * WORLD
    return seen


@pytest.mark.parametrize("blocks", [1, 3])
def test_results_in_symmetric_memory(
    blocks: int, ranks: Ranks, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.use(move=(Row(WORLD, None, "put", 8, blocks), Row(WORLD, None, "pull", 8, blocks)))
    rooms = [memory(1 << 16) for _ in range(WORLD)]
    in_symmetric_memory(ranks, rooms, monkeypatch)
    rng = random.Random(8)

    def results(*shape: int) -> list[torch.Tensor]:
        return [room.view(torch.float32)[64:][: math.prod(shape)].view(shape) for room in rooms]

    def run(operation: Operation, sources: list[torch.Tensor], outs: list[torch.Tensor]) -> list[torch.Tensor]:
        return run_with_a_slow_rank(ranks, operation, sources, outs, rng.randrange(WORLD))

    for n in (4, 8, 100, 1000, 4004, 7, 501):  # in the last two, parts are not multiples of 16 bytes
        driver.launched.clear()
        rows_of = [floats(WORLD * n, rank, rng).view(WORLD, n) for rank in range(WORLD)]
        columns = [torch.stack([each[rank] for each in rows_of]) for rank in range(WORLD)]
        seen = run(CudaEngine.all_to_all, rows_of, results(WORLD, n))
        assert all(map(torch.equal, seen, columns)), n
        sources = [floats(n, rank, rng) for rank in range(WORLD)]
        everyone = torch.stack(sources)
        seen = run(CudaEngine.all_gather, sources, results(WORLD, n))
        assert all(torch.equal(each, everyone) for each in seen), n
        for root in range(WORLD):
            sources = results(n)
            for rank, source in enumerate(sources):
                source[:] = floats(n, rank, rng)
            wanted = sources[root].clone()
            seen = run(functools.partial(CudaEngine.broadcast, root=root), sources, sources)
            assert all(torch.equal(each, wanted) for each in seen), (n, root)
        kernel = KERNELS["move"].index("put" if n % 4 == 0 else "pull")
        assert {number for number, *_ in driver.launched} == {kernel}, n


def test_a_size_may_go_to_one_place_and_then_to_another(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.use(move=(Row(WORLD, None, "put", 8, 1), Row(WORLD, None, "pull", 8, 1)))
    rooms = [memory(1 << 12) for _ in range(WORLD)]
    in_symmetric_memory(ranks, rooms, monkeypatch)
    for engine in ranks.engines:
        find = engine._find_memory
        monkeypatch.setattr(engine, "_find_memory", lambda a, n, f=find: None if a in elsewhere else f(a, n))  # type: ignore[has-type]
    first, second = (
        [room.view(torch.float32)[start:][: WORLD * 4].view(WORLD, 4) for room in rooms] for start in (0, 64)
    )
    other = [memory(WORLD * 16).view(torch.float32).view(WORLD, 4) for _ in range(WORLD)]
    elsewhere = {each.data_ptr() for each in other}
    for turn, outs in enumerate((first, second, other, first, other, second)):
        sources = [torch.full((4,), 10.0 * turn + rank) for rank in range(WORLD)]
        before = [[each.clone() for each in place] for place in (first, second, other)]
        assert ranks.run(lambda e, rank, s=sources, o=outs: e.all_gather(s[rank], o[rank])) == [None] * WORLD  # type: ignore[misc]
        assert all(torch.equal(out, torch.stack(sources)) for out in outs), turn
        for place, were in zip((first, second, other), before, strict=True):
            assert place is outs or all(map(torch.equal, place, were)), turn


class DifferentCalls:
    """Runs operations that differ by rank on :class:`Job`, and the next one, which works again after an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job = Job(monkeypatch)
        self.job.wait_for(LONG)

    def run(self, operation: Callable[[Group, int], torch.Tensor], root: int | None = None) -> list[SymmemError]:
        """The error of every rank. The results before it are not finite; the operations after it are right."""
        job = self.job

        def work(rank: int) -> list[SymmemError]:
            result = operation(job.groups[rank], rank)
            assert torch.isnan(result.float()).any() or (result == -1).any() or rank == root
            with pytest.raises(MismatchError, match="ranks are at different operations: ") as caught:
                job.reduce(rank, 2.0)
            assert [job.reduce(rank, value) for value in (3.0, 4.0)] == [9, 12]
            job.groups[rank].check()
            return [caught.value]

        return [error for (error,) in succeed(WORLD, work)]


def reduce_of(count: int, kind: str = "sum", dtype: torch.dtype = torch.float32) -> Callable[[Group], torch.Tensor]:
    return lambda group: ops.all_reduce(torch.ones(count, dtype=dtype), group, kind)


def gather_of(count: int, dtype: torch.dtype = torch.int32) -> Callable[[Group], torch.Tensor]:
    return lambda group: ops.all_gather(torch.ones(count, dtype=dtype), group)


@pytest.mark.parametrize(
    ("usual", "odd", "named"),
    [
        (reduce_of(8), reduce_of(16), "all_reduce(sum) of 8 torch.float32 on ranks 0, 2, all_reduce(sum) of 16"),
        (reduce_of(3000), reduce_of(8), "all_reduce(sum) of 3000 torch.float32 on ranks 0, 2, all_reduce(sum) of 8"),
        (reduce_of(8), reduce_of(8, "avg"), "all_reduce(sum) of 8 torch.float32 on ranks 0, 2, all_reduce(avg) of 8"),
        (gather_of(8), gather_of(4, torch.int64), "all_gather of 8 torch.int32 on ranks 0, 2, all_gather of 4 torch.i"),
        (reduce_of(8), gather_of(8), "all_reduce(sum) of 8 torch.float32 on ranks 0, 2, all_gather of 8 torch.int32"),
        (gather_of(3000), reduce_of(8), "all_gather of 3000 torch.int32 on ranks 0, 2, all_reduce(sum) of 8"),
        (
            gather_of(8),
            lambda group: ops.broadcast(torch.ones(8, dtype=torch.int32), group, 1),
            "all_gather of 8 torch.int32 on ranks 0, 2, broadcast(root 1) of 8 torch.int32",
        ),
    ],
)
@pytest.mark.parametrize("move", ["exchange", "pull"])
def test_calls_that_differ_are_named_on_all_ranks(
    usual: Any, odd: Any, named: str, move: str, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    different = DifferentCalls(monkeypatch)
    row = Row(WORLD, None, "one_shot", 8, 2)
    different.job.ranks.use(
        all_reduce=(row._replace(nbytes=100), row._replace(kernel="two_shot")), move=(row._replace(kernel=move),)
    )
    assert succeed(WORLD, lambda rank: different.job.reduce(rank, 1.0)) == [3] * WORLD

    def operation(group: Group, rank: int) -> torch.Tensor:
        if rank == 1:
            return odd(group)
        return usual(group)

    errors = different.run(operation, root=1 if "broadcast" in named else None)  # it has its own result
    assert {error.what for error in errors} == {errors[0].what}
    assert f"ranks are at different operations: {named}" in errors[0].what
    assert f"first called at {__file__}:" in errors[0].what
    assert errors[0].peers == (1,)


def test_a_rank_that_leaves_out_a_call_is_told_at_the_next_one(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 makes its second call while the others make the first one."""
    job = Job(monkeypatch)
    assert succeed(WORLD, lambda rank: job.reduce(rank, 1.0)) == [3] * WORLD

    def work(rank: int) -> list[str]:
        seen = []
        for call in (*[gather_of(8)] * (rank != 1), *[reduce_of(8)] * (3 + (rank == 1))):
            try:
                result = call(job.groups[rank]).float()
                seen.append("unfinished" if torch.isnan(result).any() or (result == -1).any() else "right")
            except MismatchError as error:
                text = "all_gather of 8 torch.int32 on ranks 0, 2, all_reduce(sum) of 8 torch.float32 on rank 1"
                seen.append("named" if text in str(error) else str(error))
        return seen

    assert succeed(WORLD, work) == [["unfinished", "named", "right", "right"]] * WORLD


@pytest.mark.parametrize("place", ["other offset", "one outside", "two outside"])
@pytest.mark.parametrize("operation", ["broadcast", "all_gather"])
def test_results_at_other_places_are_named(
    operation: str, place: str, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody stores to a peer before all have compared."""
    different = DifferentCalls(monkeypatch)
    ranks = different.job.ranks
    ranks.use(move=(Row(WORLD, None, "put", 8, 2), Row(WORLD, None, "pull", 8, 2)))
    rooms = [memory(1 << 12) for _ in range(WORLD)]
    in_symmetric_memory(ranks, rooms, monkeypatch)
    for rank in {"one outside": {1}, "two outside": {0, 2}}.get(place, set()):
        monkeypatch.setattr(ranks.engines[rank], "_find_memory", lambda address, nbytes: None)
    start = [4 * (place == "other offset" and rank == 1) for rank in range(WORLD)]
    outs = [room.view(torch.float32)[at:][:12].view(WORLD, 4) for room, at in zip(rooms, start, strict=True)]

    def call(group: Group, rank: int) -> torch.Tensor:
        source = torch.full((WORLD, 4) if operation == "broadcast" else (4,), 7.0)
        getattr(ops, operation)(source, group, *[0] * (operation == "broadcast"), out=outs[rank])
        return outs[rank]

    for error in different.run(call, root=0 if operation == "broadcast" else None):
        assert error.peers == (1,)
        assert f"{operation} of " in error.what
        assert "into byte 0 on rank" in error.what
    for room, at in zip(rooms, start, strict=True):  # nobody stored beside the results
        assert not room.view(torch.float32)[:at].any()
        assert not room.view(torch.float32)[at + 12 :].any()


@pytest.mark.parametrize(
    ("step", "kernel", "late"),
    [
        ("all_reduce", "one_shot", {2}),
        ("all_reduce", "two_shot", {1, 2}),
        ("all_gather", "exchange", {1}),
        ("all_gather", "pull", {2}),
        ("all_gather", "put", {0}),
    ],
)
def test_who_waits_for_a_rank_says_so(
    step: str, kernel: str, late: set[int], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the rank comes; see :mod:`symmem.backends.kernel_words`."""
    rooms = [memory(1 << 12) for _ in range(WORLD)]
    in_symmetric_memory(ranks, rooms, monkeypatch)
    results = [room.view(torch.float32)[: WORLD * 100].view(WORLD, 100) for room in rooms]
    rows = (Row(WORLD, None, kernel, 32, 1), Row(WORLD, None, "pull", 32, 1))
    go, groups = threading.Event(), [engine._group for engine in ranks.engines]

    def work(engine: CudaEngine, rank: int) -> None:
        if rank in late:
            assert go.wait(LONG)
        if step == "all_reduce":
            engine.use(engine.table._replace(all_reduce=rows))
            engine.all_reduce(torch.ones(100), torch.empty(100), "sum")
        else:
            engine.use(engine.table._replace(move=rows))
            engine.all_gather(torch.ones(100), results[rank])

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(ranks.run, work)
        waiting = {(rank, step, tuple(sorted(late))) for rank in range(WORLD) if rank not in late}
        deadline = time.monotonic() + LONG
        try:
            while {(groups.index(each.group), each.step, each.missing()) for each in gpu_waits()} != waiting:  # type: ignore[arg-type]
                assert time.monotonic() < deadline
        finally:
            go.set()
        assert done.result() == [None] * WORLD
    while gpu_waits():
        assert time.monotonic() < deadline


LOST = 2


@pytest.mark.parametrize(
    ("step", "kernel"),
    [
        *(("all_reduce", kernel) for kernel in ("one_shot", "two_shot")),
        ("reduce_scatter", "reduce_scatter"),
        *((step, kernel) for step in ("all_gather", "all_to_all") for kernel in ("exchange", "pull", "put")),
        *(("broadcast", kernel) for kernel in ("exchange", "pull", "put")),
    ],
)
def test_a_lost_rank_ends_waits_and_leaves_nothing_that_looks_right(
    step: str, kernel: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every element is right or a NaN, in the operation in which the rank is lost and in those after it."""
    rooms = [memory(1 << 13) for _ in range(WORLD)]
    if kernel == "put":
        in_symmetric_memory(ranks, rooms, monkeypatch)
    n = 96
    row = (Row(WORLD, None, kernel, 32, 2), Row(WORLD, None, "pull", 32, 2))
    ranks.use(**{"move" if step in ("all_gather", "all_to_all", "broadcast") else step: row})
    groups: list[Any] = [engine._group for engine in ranks.engines]
    given = {"reduce_scatter": (WORLD * n,), "all_to_all": (WORLD, n)}.get(step, (n,))
    made = (WORLD, n) if step in ("all_gather", "all_to_all") else (n,)
    sources = [torch.full(given, float(rank + 1)) for rank in range(WORLD)]
    outs = [room.view(torch.float32)[: torch.Size(made).numel()].view(made) for room in rooms]
    right = torch.full(made, 6.0 if step in ("all_reduce", "reduce_scatter") else LOST + 1.0)
    if step in ("all_gather", "all_to_all"):
        right = torch.arange(1.0, WORLD + 1).view(-1, 1).expand(made)

    def operation(engine: CudaEngine, rank: int) -> None:
        option = {"broadcast": LOST, "all_reduce": "sum", "reduce_scatter": "sum"}.get(step)
        getattr(engine, step)(sources[rank], outs[rank], *([] if option is None else [option]))

    def run(engine: CudaEngine, rank: int) -> None:
        if rank == LOST:
            time.sleep(0.01)
            for group in groups:
                group.lose(LOST)
        else:
            operation(engine, rank)

    for rank in range(WORLD):
        outs[rank].fill_(-1)
    began = time.monotonic()
    assert ranks.run(run) == [None] * WORLD
    assert time.monotonic() - began < LONG
    for rank in range(LOST):
        assert torch.isnan(outs[rank]).any()
        assert torch.all(torch.isnan(outs[rank]) | (outs[rank] == right))
        with pytest.raises(PeerLostError, match=rf"rank {LOST}'s process ended .* is NaN in reductions") as caught:
            operation(ranks.engines[rank], rank)
        assert caught.value.peers == (LOST,)
        assert caught.value.step == step
        with pytest.raises(PeerLostError):
            ranks.engines[rank].check()
    for engine in ranks.engines:  # a graph would launch the kernel again
        engine._state.given_up(engine._number)[0] = 0
    assert ranks.run(lambda engine, rank: operation(engine, rank) if rank != LOST else None) == [None] * WORLD
    for rank in range(LOST):
        assert torch.isnan(outs[rank]).any()
        assert torch.all(torch.isnan(outs[rank]) | (outs[rank] == right))


@pytest.mark.parametrize("kernel", ["exchange", "pull", "put"])
def test_a_rank_that_gave_up_overwrites_nothing_of_a_rank_that_is_behind(
    kernel: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 runs three operations without rank 1, which then finds the first one or nothing."""
    rooms = [memory(1 << 13) for _ in range(WORLD)]
    if kernel == "put":
        in_symmetric_memory(ranks, rooms, monkeypatch)
    ranks.use(move=(Row(WORLD, None, kernel, 32, 2), Row(WORLD, None, "pull", 32, 2)))
    engines: list[Any] = ranks.engines
    for engine in engines:
        engine._group.lose(LOST)
    n = 96

    def gather(rank: int, value: float) -> torch.Tensor:
        engines[rank]._state.given_up(engines[rank]._number)[0] = 0  # as in a graph, or a queue
        out = rooms[rank].view(torch.float32)[: WORLD * n].view(WORLD, n)
        engines[rank].all_gather(torch.full((n,), value), out)
        return out.clone()

    for value in (1.0, 2.0, 3.0):
        ahead = gather(0, value)
        assert torch.isnan(ahead[1:]).all()
    for value in (1.0, 2.0, 3.0):
        behind = gather(1, 10 * value)
        assert torch.all(torch.isnan(behind[0]) | (behind[0] == value)), value
        assert torch.isnan(behind[LOST]).all()


# A rank refuses a call, or comes too late.

EVERY_KERNEL = [
    *(("all_reduce", kernel) for kernel in ("one_shot", "two_shot")),
    ("reduce_scatter", "reduce_scatter"),
    *((step, kernel) for step in ("all_gather", "all_to_all") for kernel in ("exchange", "pull", "put")),
    *(("broadcast", kernel) for kernel in ("exchange", "pull", "put")),
]
ABSENT = 2


def operation_of(
    step: str, kernel: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[CudaEngine, int], None], list[torch.Tensor], torch.Tensor]:
    """An operation by that kernel; the result of every rank, and the right one."""
    rooms = [memory(1 << 13) for _ in range(WORLD)]
    if kernel == "put":
        in_symmetric_memory(ranks, rooms, monkeypatch)
    row = (Row(WORLD, None, kernel, 32, 2), Row(WORLD, None, "pull", 32, 2))
    ranks.use(**{"move" if step in ("all_gather", "all_to_all", "broadcast") else step: row})
    n = 96
    given = {"reduce_scatter": (WORLD, n), "all_to_all": (WORLD, n)}.get(step, (n,))
    made = (WORLD, n) if step in ("all_gather", "all_to_all") else (n,)
    sources = [torch.full(given, float(rank + 1)) for rank in range(WORLD)]
    outs = [room.view(torch.float32)[: torch.Size(made).numel()].view(made) for room in rooms]
    option = {"broadcast": ABSENT, "all_reduce": "sum", "reduce_scatter": "sum"}.get(step)

    def operation(engine: CudaEngine, rank: int) -> None:
        outs[rank].fill_(-1)
        getattr(engine, step)(sources[rank], outs[rank], *([] if option is None else [option]))

    right = torch.full(made, 6.0 if step in ("all_reduce", "reduce_scatter") else ABSENT + 1.0)
    if step in ("all_gather", "all_to_all"):
        right = torch.arange(1.0, WORLD + 1).view(-1, 1).expand(made)
    return operation, outs, right


def unfinished(out: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether some elements are NaNs, and all others are right."""
    return bool(torch.isnan(out).any() and torch.all(torch.isnan(out) | (out == right)))


def all_gave_up(step: str, kernel: str, outs: list[torch.Tensor]) -> bool:
    """Whether all ranks gave up an operation. The root of a broadcast has the result already, unless peers store it."""
    has_result = ABSENT if step == "broadcast" and kernel != "put" else None
    return all(bool(torch.isnan(out).any()) != (rank == has_result) for rank, out in enumerate(outs))


@pytest.mark.parametrize(("step", "kernel"), EVERY_KERNEL)
def test_a_refusal_releases_the_others(step: str, kernel: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, outs, right = operation_of(step, kernel, ranks, monkeypatch)
    assert ranks.run(operation) == [None] * WORLD
    assert all(torch.equal(out, right) for out in outs)

    def run(engine: CudaEngine, rank: int) -> None:
        if rank == ABSENT:
            time.sleep(0.01)
            engine.refuse(step, InvalidArgumentError("no"))
        else:
            operation(engine, rank)

    assert ranks.run(run) == [None] * WORLD
    for rank in range(WORLD):
        assert ranks.areas[rank][END].item() == 3  # the first operation has turn 0
        assert ranks.engines[rank].gave_up
        assert rank == ABSENT or unfinished(outs[rank], right)
    for rank in range(ABSENT):
        with pytest.raises(RendezvousError, match=f"step {step}. rank {ABSENT} refused a call. .* is NaN in") as caught:
            ranks.engines[rank].check()
        assert caught.value.peers == (ABSENT,)
        ranks.engines[rank].check()  # raised once
    for engine in ranks.engines:  # a graph would launch the kernel again
        engine._state.given_up(engine._number)[0] = 0
    assert ranks.run(operation) == [None] * WORLD
    assert all_gave_up(step, kernel, outs)
    assert all(engine.gave_up for engine in ranks.engines)


@pytest.mark.parametrize(("step", "kernel"), EVERY_KERNEL)
def test_operations_before_the_refused_one_end_as_usual(
    step: str, kernel: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, outs, right = operation_of(step, kernel, ranks, monkeypatch)
    for area in ranks.areas:
        area[END] = 2 * 2 + 1
    for _ in range(2):
        assert ranks.run(operation) == [None] * WORLD
        assert all(torch.equal(out, right) for out in outs)
    assert ranks.run(operation) == [None] * WORLD
    assert all_gave_up(step, kernel, outs)


@pytest.mark.parametrize(("step", "kernel"), EVERY_KERNEL)
def test_a_timeout_ends_the_operation_on_all_ranks(
    step: str, kernel: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StubGroup, "settings", SimpleNamespace(signal_timeout=0.2, algorithms="built-in"))
    for engine in ranks.engines:
        engine._plans.clear()
    operation, outs, right = operation_of(step, kernel, ranks, monkeypatch)
    operation(ranks.engines[0], 0)
    assert unfinished(outs[0], right)
    began = time.monotonic()
    for late in (1, 2):
        group: Any = ranks.engines[late]._group
        group.settings = SimpleNamespace(signal_timeout=10 * LONG, algorithms="built-in")
        operation(ranks.engines[late], late)  # it would wait for as long
    assert time.monotonic() - began < LONG
    assert all_gave_up(step, kernel, outs)
    named = []
    for rank, engine in enumerate(ranks.engines):
        came = "did not come while rank 0 waited for it" if rank else "did not come in time"
        with pytest.raises(PeerTimeoutError, match=rf"step {step}. rank \d {came}") as caught:
            operation(engine, rank)
        named.append(caught.value.peers)
        engine.check()  # raised once
    assert named in ([(1,)] * WORLD, [(2,)] * WORLD)


class Job:
    """Groups whose operators on the CPU run on emulated GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SYMMEM_ENABLE", f"signal_timeout({LONG}s)")
        self.groups = make_groups(WORLD, name="job")
        self.ranks = Ranks(list(self.groups), SMALL)
        self.engines = self.ranks.engines
        for group, engine in zip(self.groups, self.engines, strict=True):
            group.extension(Engines)[torch.device("cpu")] = engine

    def wait_for(self, seconds: float) -> None:
        """The time limit of later operations."""
        for group, engine in zip(self.groups, self.engines, strict=True):
            group.settings = dataclasses.replace(group.settings, signal_timeout=seconds)
            engine.use(engine.table)

    def reduce(self, rank: int, value: float, **options: Any) -> float:
        return float(ops.all_reduce(torch.full((8,), value), self.groups[rank], **options)[0])

    def refuse(self, rank: int) -> None:
        with pytest.raises(InvalidArgumentError, match="out must have"):
            self.reduce(rank, 9.0, out=torch.ones(8, dtype=torch.float64))

    def notices(self, rank: int, at_once: bool) -> None:
        """Let the host of a rank notice at once that kernels gave up, or as if it were ahead of its GPU."""
        words = self.engines[rank]._state.given_up(self.engines[rank]._number)
        self.engines[rank]._given_up = words if at_once else (ctypes.c_uint32 * 4)()


def test_the_next_call_after_a_refusal_works(
    kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(monkeypatch)

    def work(rank: int) -> None:
        for value in (1.0, 2.0):
            assert job.reduce(rank, value) == 3 * value
            if rank == ABSENT:
                job.refuse(rank)
            else:
                assert math.isnan(job.reduce(rank, 5.0))
            assert job.reduce(rank, 10 * value) == 30 * value
            if rank == ABSENT:
                job.groups[rank].check()
                continue
            with pytest.raises(InvalidArgumentError, match=r"rank 2, group job, step all_reduce. out must"):
                job.groups[rank].check()
            job.groups[rank].check()

    succeed(WORLD, work)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(messages) == 4
    for message in messages:
        assert "gave up, because a rank refused it: [rank 2, group job, step all_reduce] out must have" in message


def test_a_rank_may_be_ahead_of_its_gpu_when_another_refuses(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 launches two more operations before it notices. The other ranks raise in these calls."""
    job = Job(monkeypatch)

    def work(rank: int) -> None:
        assert job.reduce(rank, 1.0) == 3
        job.notices(rank, rank != 0)
        if rank == ABSENT:
            job.refuse(rank)
        else:
            assert math.isnan(job.reduce(rank, 5.0))
        for value in (6.0, 7.0):
            if rank == 0:
                assert math.isnan(job.reduce(rank, value))
            else:
                with pytest.raises(InvalidArgumentError, match=r"out must have.* This call gave up too"):
                    job.reduce(rank, value)
        job.notices(rank, True)
        for value in (8.0, 9.0):
            assert job.reduce(rank, value) == 3 * value

    succeed(WORLD, work)


def test_calls_work_after_a_timeout_when_the_late_rank_is_back(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch)
    gave_up = threading.Barrier(WORLD)
    assert succeed(WORLD, lambda rank: job.reduce(rank, 1.0)) == [3] * WORLD
    job.wait_for(0.2)

    def work(rank: int) -> None:
        if rank == ABSENT:
            gave_up.wait(LONG)
        assert math.isnan(job.reduce(rank, 2.0))
        if rank != ABSENT:
            gave_up.wait(LONG)
        with pytest.raises(PeerTimeoutError, match=r"step all_reduce. rank \d did not come"):
            job.reduce(rank, 3.0)
        job.groups[rank].check()

    succeed(WORLD, work)
    job.wait_for(LONG)
    assert succeed(WORLD, lambda rank: [job.reduce(rank, value) for value in (4.0, 5.0)]) == [[12, 15]] * WORLD


def test_a_rank_that_stays_away_is_named_again(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch)
    assert succeed(WORLD, lambda rank: job.reduce(rank, 1.0)) == [3] * WORLD

    job.wait_for(0.2)

    def alone(rank: int) -> None:
        if rank != ABSENT:
            assert math.isnan(job.reduce(rank, 2.0))
            for step in ("all_reduce", "resumption of collective operations"):
                with pytest.raises(PeerTimeoutError, match=f"step {step}"):
                    job.reduce(rank, 3.0)

    succeed(WORLD, alone)

    def together(rank: int) -> list[float]:
        seen = []
        for value in range(7 if rank == ABSENT else 10, 20):  # it has made three calls less
            try:
                seen.append(job.reduce(rank, float(value)))
            except PeerTimeoutError:
                seen.append(-1.0)
        return seen

    job.wait_for(LONG)
    results = succeed(WORLD, together)
    assert math.isnan(results[ABSENT][0])
    assert results[ABSENT][1:3] == [-1, -1]
    assert results[0] == results[1] == results[ABSENT][3:]
    assert results[0][1:] == [3 * value for value in range(11, 20)]


def test_a_launch_that_fails_on_one_rank_is_refused(
    kernels: None, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(monkeypatch)
    launch = job.engines[ABSENT]._launch_kernel

    def work(rank: int) -> None:
        assert job.reduce(rank, 1.0) == 3
        if rank == ABSENT:
            job.engines[rank]._launch_kernel = lambda *_: (SimpleNamespace(name="CUDA_ERROR_NOT_PERMITTED"),)
            with pytest.raises(UnsupportedError, match="cannot be launched"):
                job.reduce(rank, 2.0)
            job.engines[rank]._launch_kernel = launch
        else:
            assert math.isnan(job.reduce(rank, 2.0))
        assert job.reduce(rank, 3.0) == 9

    succeed(WORLD, work)


def test_a_refusal_in_a_capture_is_local(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch)
    assert succeed(WORLD, lambda rank: job.reduce(rank, 1.0)) == [3] * WORLD
    monkeypatch.setattr("torch._C._cuda_isCurrentStreamCapturing", lambda: True)
    job.refuse(0)
    monkeypatch.setattr("torch._C._cuda_isCurrentStreamCapturing", lambda: False)
    assert [engine._calls() for engine in job.engines] == [1] * WORLD
    assert succeed(WORLD, lambda rank: job.reduce(rank, 1.0)) == [3] * WORLD


def test_empty_calls_count(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch)

    def work(rank: int) -> None:
        assert job.reduce(rank, 1.0) == 3
        nothing = torch.empty(0)
        if rank == ABSENT:
            with pytest.raises(InvalidArgumentError, match="out must have"):
                ops.all_reduce(nothing, job.groups[rank], out=torch.empty(1))
        else:
            ops.all_reduce(nothing, job.groups[rank])
        assert [engine._calls() for engine in job.engines][rank] == 2

    succeed(WORLD, work)
    # The kernels of the others begin after the refusal.
    found = succeed(WORLD, lambda rank: [job.reduce(rank, value) for value in (2.0,)] if rank == ABSENT + 1 else [])
    assert found == [[]] * WORLD


def test_a_first_call_that_is_refused_fails_on_all_ranks(
    kernels: None, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("symmem.memory.cuda_graphs.is_capturing", lambda device: False)
    job = Job(monkeypatch)
    for engine in job.engines:
        engine._areas = ()

    def work(rank: int) -> object:
        x = torch.ones(4, dtype=torch.int32 if rank == ABSENT else torch.float32)
        return ops.all_reduce(x, job.groups[rank])

    for error in run_ranks(WORLD, work):
        assert isinstance(error, UnsupportedError)
        assert error.rank == ABSENT
    assert driver.launched == []


# Work of the host.


@pytest.fixture
def alone(driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> CudaEngine:
    functions = {name: (None, name) for names in KERNELS.values() for name in names}
    monkeypatch.setattr(cuda, "program", lambda *_: SimpleNamespace(functions=functions))
    engine = CudaEngine(StubGroup(1, 8), torch.device("cuda", 0))  # type: ignore[arg-type]
    area = memory(4096)
    engine._areas = tuple(area.data_ptr() + 64 * rank for rank in range(8))
    monkeypatch.setattr(engine, "area", area, raising=False)  # keeps the memory
    return engine


def test_arguments_are_laid_out_once(alone: CudaEngine, driver: EmulatedDriver) -> None:
    x, y = torch.zeros(1000), torch.zeros(1000)
    alone.all_reduce(x, y, "sum")
    (launch,) = alone._plans["all_reduce", x.shape, torch.float32, "sum"]
    assert (launch.call.source, launch.call.out) == (x.data_ptr(), y.data_ptr())
    assert (launch.call.bytes, launch.call.rank, launch.call.limit) == (4000, 1, 20_000_000_000)
    alone.all_reduce(y, y, "sum")
    assert (launch.call.source, launch.call.out) == (y.data_ptr(), y.data_ptr())
    assert driver.launched == [("one_shot", 2, 128 + COMPARING)] * 2
    assert len(alone._plans) == 1


def test_what_is_larger_than_the_workspace_is_cut(alone: CudaEngine, driver: EmulatedDriver) -> None:
    x = torch.empty(20 << 20)
    alone.all_reduce(x, x, "sum")
    plan = next(iter(alone._plans.values()))
    assert sum(launch.call.bytes for launch in plan) == x.nbytes
    assert all(launch.call.slice <= alone.layout.slot // 2 for launch in plan)
    assert all(launch.call.slice * 8 >= launch.call.bytes for launch in plan)
    assert [name for name, _blocks, _threads in driver.launched] == ["two_shot"] * len(plan)


def test_nothing_is_launched_for_nothing(alone: CudaEngine, driver: EmulatedDriver) -> None:
    nothing = torch.empty(0)
    alone.all_reduce(nothing, nothing, "sum")
    alone.all_gather(nothing, torch.empty(8, 0))
    alone.reduce_scatter(torch.empty(8, 0), nothing, "sum")
    assert driver.launched == []


def test_a_group_of_one(driver: EmulatedDriver) -> None:
    engine = CudaEngine(StubGroup(0, 1), torch.device("cuda", 0))  # type: ignore[arg-type]
    x, y = torch.arange(10.0), torch.zeros(10)
    engine.all_reduce(x, y, "avg")
    assert torch.equal(x, y)
    z = torch.zeros(1, 10)
    engine.all_gather(x, z)
    assert torch.equal(z[0], x)
    assert driver.launched == []


def test_integers_are_refused(alone: CudaEngine) -> None:
    x = torch.zeros(10, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=r"all_reduce of torch\.int32") as caught:
        alone.all_reduce(x, x, "sum")
    assert caught.value.rank == 1
    alone._state.resume(alone._number, caught.value)
    alone.all_gather(x, torch.zeros(8, 10, dtype=torch.int32))


def test_the_first_operation_amid_a_capture_is_refused(driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symmem.memory.cuda_graphs.is_capturing", lambda device: True)
    engine = CudaEngine(StubGroup(1, 8), torch.device("cuda", 0))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="the first all_gather of the group 'g' during the capture"):
        engine.all_gather(torch.zeros(4), torch.zeros(8, 4))


def test_a_graph_keeps_what_its_kernels_store_to(alone: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr("symmem.memory.cuda_graphs.keep", kept.append)
    block, out = StubBlock(), torch.zeros(8, 1 << 18)
    memory = cuda._SymmetricOut((0,) * 8, "", weakref.ref(block))  # type: ignore[arg-type]
    monkeypatch.setattr(alone, "_find_memory", lambda address, nbytes: memory if address == out.data_ptr() else None)
    alone._workspace = SimpleNamespace(_block="workspace")  # type: ignore[assignment]
    alone.all_gather(out[0].clone(), out)
    assert kept == []
    monkeypatch.setattr("torch._C._cuda_isCurrentStreamCapturing", lambda: True)
    for nbytes in (1 << 20, (1 << 20) + 16):  # for the latter, the result's address matters
        out = torch.zeros(8, nbytes // 4)
        kept.clear()
        alone.all_gather(out[0].clone(), out)
        assert kept == ["workspace"] + [block] * (nbytes > 1 << 20)


def test_a_launch_that_fails_is_named(alone: CudaEngine, driver: EmulatedDriver) -> None:
    driver.code = SimpleNamespace(name="CUDA_ERROR_NOT_PERMITTED", __bool__=lambda: True)  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="collective kernel cannot be launched"):
        alone.all_reduce(torch.zeros(4), torch.zeros(4), "sum")


def test_steps_do_not_clash_with_the_signals() -> None:
    assert min(STEPS) > len(cuda_signals.OPERATIONS)  # type: ignore[attr-defined]


# The checked mode.


@pytest.fixture
def checked(ranks: Ranks) -> list[Group]:
    """Groups with emulated, checked engines for tensors on the CPU."""
    groups = make_groups(WORLD, name="checked")
    for group, engine in zip(groups, ranks.engines, strict=True):
        group.extension(Engines)[torch.device("cpu")] = CheckedEngine(engine, group)
        engine._group = group
    return groups


@pytest.mark.parametrize(
    ("call", "differs"),
    [
        (lambda g, odd: ops.all_reduce(torch.ones(4 + odd), g), "shape of x: [4] on ranks 0, 2, [5] on rank 1"),
        (lambda g, odd: ops.all_reduce(torch.ones(6).view(2 + odd, -1), g), "shape of x"),
        (lambda g, odd: ops.all_reduce(torch.ones(4), g, ("sum", "max")[odd]), "reduction: sum on ranks 0, 2, max on"),
        (
            lambda g, odd: ops.all_gather(torch.ones(4, dtype=(torch.float32, torch.int32)[odd]), g),
            "dtype: torch.float",
        ),
        (lambda g, odd: ops.broadcast(torch.ones(4), g, root=int(odd)), "root: 0 on ranks 0, 2, 1 on rank 1"),
        (
            lambda g, odd: (ops.all_to_all if odd else ops.reduce_scatter)(torch.ones(3, 2), g),
            "operation: reduce_scatter on ranks 0, 2, all_to_all on rank 1",
        ),
    ],
)
def test_ranks_that_do_not_call_alike_are_named_before_a_launch(
    call: Callable[[Group, bool], object], differs: str, checked: list[Group], driver: EmulatedDriver
) -> None:
    for error in run_ranks(WORLD, lambda rank: call(checked[rank], rank == 1)):
        assert isinstance(error, MismatchError)
        name, _, values = differs.partition(": ")
        assert f"ranks disagree on {name!r}: {values}" in str(error)
        assert error.peers == (1,)
    assert driver.launched == []
    for rank, result in enumerate(run_ranks(WORLD, lambda rank: ops.all_reduce(torch.ones(4) * rank, checked[rank]))):
        assert result.tolist() == [3] * 4, rank  # later calls work


def test_a_refusal_reaches_the_others_at_once(checked: list[Group], driver: EmulatedDriver) -> None:
    def call(rank: int) -> object:
        x = torch.ones(4)
        return ops.all_reduce(x, checked[rank], out=torch.ones(5) if rank == 2 else None)

    for error in run_ranks(WORLD, call):
        assert isinstance(error, InvalidArgumentError)
        assert error.rank == 2
        assert "out must have shape [4]" in str(error)
    assert driver.launched == []
    assert all(
        result.tolist() == [3] for result in succeed(WORLD, lambda rank: ops.all_reduce(torch.ones(1), checked[rank]))
    )


def test_checked_ranks_all_raise_what_one_of_them_saw(checked: list[Group], ranks: Ranks) -> None:
    def work(rank: int) -> object:
        if rank == 2:  # an error between the comparison and the launch
            ranks.engines[rank].refuse("all_reduce", InvalidArgumentError("no", rank=2))
        else:
            ranks.engines[rank].all_reduce(torch.ones(4), torch.empty(4), "sum")
        return None

    succeed(WORLD, work)
    ranks.engines[0]._state.given_up(ranks.engines[0]._number)[0] = 0  # its host does not know yet
    for error in run_ranks(WORLD, lambda rank: ops.all_reduce(torch.ones(4), checked[rank])):
        assert isinstance(error, InvalidArgumentError)
        assert error.rank == 2
    assert succeed(WORLD, lambda rank: ops.all_reduce(torch.ones(1), checked[rank]).tolist()) == [[3]] * WORLD
    for group in checked:
        group.check()


@pytest.mark.parametrize("check", ["each", "off"])
def test_the_setting_decides(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", f"collective_check({check})")
    (group,) = make_groups(1, name="setting")
    assert isinstance(engine_for(group, torch.device("cpu")), CheckedEngine) == (check == "each")
    assert ops.all_reduce(torch.ones(2), group).tolist() == [1, 1]


def test_ranks_compare_their_tables_before_they_map_memory(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("symmem.memory.cuda_graphs.is_capturing", lambda device: False)
    groups = make_groups(2, name="tables")
    engines = [CudaEngine(group, torch.device("cuda", 0)) for group in groups]
    engines[1].use(engines[1].table._replace(move=(Row(2, None, "pull", 64, 1),)))
    x = torch.ones(4)
    for error in run_ranks(2, lambda rank: engines[rank].all_reduce(x, x, "sum")):
        assert isinstance(error, MismatchError)
        assert "ranks disagree on 'table of algorithms'" in str(error)


@pytest.mark.parametrize("operation", sorted(CONFIGURED))
def test_tuning_runs_each_row_and_nothing_else(
    operation: str, ranks: Ranks, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer counts instead of measuring."""
    n = 64
    rooms = [memory(WORLD * n * 4) for _ in range(WORLD)]
    in_symmetric_memory(ranks, rooms, monkeypatch)
    kernels = CONFIGURED[operation]
    rows = [Row(WORLD, None, kernel, 64, blocks) for kernel in kernels for blocks in (1, 2)]
    others = [torch.empty(WORLD, n) for _ in range(WORLD)]
    tables = [engine.table for engine in ranks.engines]
    found: list[list[float]] = [[]] * WORLD

    def work(engine: CudaEngine, rank: int) -> None:
        call = call_of(engine, operation, rooms[rank].view(torch.float32).view(WORLD, n), others[rank])
        found[rank] = each_row(engine, operation, rows, call, lambda call: (call(), 7.0)[1])

    assert ranks.run(work) == [None] * WORLD
    assert found == [[7.0] * len(rows)] * WORLD
    wanted = [
        (list(KERNELS["move" if operation == "move" else "reduce"]).index(row.kernel), 1, 64 + COMPARING)
        for row in rows
    ]
    assert sorted(driver.launched) == sorted(wanted * WORLD)
    assert [engine.table for engine in ranks.engines] == tables

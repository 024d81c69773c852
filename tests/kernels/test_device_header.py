"""symmem.cuh and the guide's kernel: compiled for GPUs, and their protocol executed by CPU threads."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import ROOT, blocks
from emulated_gpu import COMPILER, WAITING, emulate
from patience import TASK
from thread_ranks import succeed

import symmem
from symmem.backends import signal_kernels
from symmem.backends.kernel_words import NBYTES
from symmem.tensor.device_view import View
from symmem.tools.cli import main

HEADER = Path(symmem.include_path(), "symmem.cuh")
WORLD, BLOCKS, THREADS, ROUNDS = 3, 2, 4, 20
CHANNELS, ELEMENTS = 5, BLOCKS * THREADS
NAMES = ("meet", "ring", "tally", "late", "bad_channel", "keep", "guide")

KERNELS = Path(__file__).with_name("header_kernels.cu").read_text()
INCLUDE = '#include "symmem.cuh"\n'
PAGE = (ROOT / "docs" / "kernels.md").read_text()
GUIDE = "".join(f"{block.text}\n" for block in blocks(PAGE) if block.language == "cpp")
CALLS_GUIDE = "void guide(Call call) { add_next(call.view, (float *)call.x, (float *)call.out, 16); }\n"

ATOMICS = {
    "add": "old = __atomic_fetch_add(remote(view, local, peer), value, __ATOMIC_ACQ_REL);",
    "exch": "old = __atomic_exchange_n(remote(view, local, peer), value, __ATOMIC_ACQ_REL);",
    "cas": "old = expected; __atomic_compare_exchange_n(remote(view, local, peer), &old, value, false, "
    "__ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);",
}
REPLACED = {
    "load_relaxed": "sched_yield(); if (stopped) leave(); return __atomic_load_n(word, __ATOMIC_RELAXED);",
    "add_release": "__atomic_fetch_add(word, value, __ATOMIC_RELEASE);",
    "add_acquire": "return __atomic_fetch_add(word, value, __ATOMIC_ACQUIRE);",
    "now": "struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000ull + t.tv_nsec;",
    "leave_word": WAITING["leave_word"],
}


LAYOUT = "".join(
    f'static_assert(__builtin_offsetof(symmem::View, {name}) == {getattr(View, name).offset}, "{name}");\n'  # type: ignore[misc]
    for name, _kind in View._fields_
)


class Call(ctypes.Structure):
    _fields_ = (("view", View), ("x", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_void_p))


class Ranks:
    """Memory of all ranks, and kernels that run on all ranks at the same time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.x = [(ctypes.c_int32 * 16)() for _ in range(WORLD)]  # 64 bytes; the last 32 of them are n
        self.out = [(ctypes.c_int32 * (ELEMENTS * (ROUNDS + 1)))() for _ in range(WORLD)]
        self.words = [(ctypes.c_uint32 * (CHANNELS * WORLD))() for _ in range(WORLD)]
        self.status = (ctypes.c_uint32 * (NBYTES // 4))()
        self._tables = [(ctypes.c_uint64 * WORLD)(*map(ctypes.addressof, memory)) for memory in (self.x, self.words)]

    def launch(self, name: str, blocks: int = 1, seconds: float = 30.0) -> list[int]:
        pointers, signals = map(ctypes.addressof, self._tables)

        def one(rank: int) -> int:
            view = View(
                pointers=pointers,
                signals=signals,
                status=ctypes.addressof(self.status),
                nbytes=64,
                limit=int(seconds * 1e9),
                rank=rank,
                world=WORLD,
                channels=CHANNELS,
                group=9,
            )
            x = ctypes.addressof(self.x[rank])
            call = Call(view, x, ctypes.addressof(self.out[rank]), x + 32)
            return int(self.library.launch(NAMES.index(name), ctypes.byref(call), blocks, THREADS))

        return succeed(WORLD, one)

    def at_rest(self) -> bool:
        return not any(any(words) for words in self.words)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    source = HEADER.read_text()
    for name, by in ATOMICS.items():
        pattern = rf'asm volatile\("atom\.acq_rel\.sys\.global\.{name}\..*?"memory"\);'
        source, times = re.subn(pattern, by, source, flags=re.DOTALL)
        assert times == 1
    source += LAYOUT + GUIDE.replace(INCLUDE, "") + KERNELS + CALLS_GUIDE
    return emulate(source, REPLACED, NAMES, {}, tmp_path_factory.mktemp("header") / "kernels.so")


@pytest.fixture
def ranks(library: ctypes.CDLL) -> Iterator[Ranks]:
    yield Ranks(library)
    library.restart()


def test_blocks_of_all_ranks_meet(ranks: Ranks) -> None:
    assert ranks.launch("meet", BLOCKS) == [0] * WORLD
    expected = [(at + turn) * WORLD * (WORLD + 1) // 2 for turn in range(ROUNDS) for at in range(ELEMENTS)]
    for out in ranks.out:
        assert list(out)[: len(expected)] == expected
    assert ranks.at_rest()


def test_what_was_put_is_there_when_the_signal_is(ranks: Ranks) -> None:
    assert ranks.launch("ring") == [0] * WORLD
    for rank, out in enumerate(ranks.out):
        expected = [100 * turn + (rank - 1) % WORLD for turn in range(ROUNDS) for _ in range(THREADS)]
        assert list(out)[THREADS : THREADS + len(expected)] == expected
    assert ranks.at_rest()


def test_atomics(ranks: Ranks) -> None:
    assert ranks.launch("tally", 10) == [0] * WORLD
    words = (ctypes.c_uint64 * 2).from_buffer(ranks.x[0], 32)
    assert ranks.x[0][0] == 10 * THREADS * WORLD
    assert words[0] == 10 * THREADS * WORLD << 32
    assert words[1] == 7
    assert ranks.x[0][1] in (1, 2, 3)
    assert list(ranks.x[0])[4 : 4 + WORLD] == [9] * WORLD


def test_who_is_late_is_named(ranks: Ranks) -> None:
    assert 1 in ranks.launch("late", seconds=0.5)
    operation, channel, peer, group = ranks.status[:4]
    assert (operation, channel, group) == (1, 2, 9)
    assert peer in (1, 2)
    # Before, it reported its wait in the record of every peer.
    for peer in (1, 2):
        place = 4 * (1 + (9 * signal_kernels.GROUP_SPREAD + peer) % signal_kernels.PLACES)
        who, whom, waited, left = ranks.status[place : place + 4]
        assert (who, whom) == (1 << 24 | 9, 2 << 16 | peer)
        assert waited > 0
        assert left < 0.5e9 / 2**signal_kernels.TICK


def test_the_numbers_are_those_of_the_package() -> None:
    (text,) = re.findall(r"enum : u32 \{ (BEAT = .*) \};", HEADER.read_text())
    for name, number in (pair.split(" = ") for pair in text.split(", ")):
        assert int(number) == getattr(signal_kernels, name)


def test_a_channel_that_is_not_there(ranks: Ranks) -> None:
    assert 1 in ranks.launch("bad_channel")
    assert ranks.status[:4] == [4, 5, CHANNELS, 9]
    assert ranks.at_rest()


def test_a_count_is_left_where_it_is_kept(ranks: Ranks) -> None:
    assert ranks.launch("keep") == [0] * WORLD
    for rank, words in enumerate(ranks.words):
        assert [at for at, word in enumerate(words) if word == 3] == [4 * WORLD + rank]


def test_the_kernel_of_the_guide_adds_what_the_next_rank_has(ranks: Ranks) -> None:
    for rank, words in enumerate(ranks.x):
        (ctypes.c_float * 16).from_buffer(words)[:] = [100 * rank + at for at in range(16)]
    assert ranks.launch("guide", BLOCKS) == [0] * WORLD
    for rank, words in enumerate(ranks.out):
        both = 100 * (rank + (rank + 1) % WORLD)
        assert (ctypes.c_float * 16).from_buffer(words)[:] == [both + 2 * at for at in range(16)]
    assert ranks.at_rest()


# The header as it is, and the guide's kernel before anything else.

CHECKED = INCLUDE + LAYOUT + GUIDE


def compiled(source: str, tmp_path: Path, *command: str) -> str:
    (tmp_path / "kernels.cu").write_text(source)
    include = f"-I{symmem.include_path()}"
    done = subprocess.run([*command, include, "kernels.cu"], capture_output=True, text=True, cwd=tmp_path, timeout=TASK)
    return done.stderr + done.stdout if done.returncode else ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("standard", ["c++14", "c++20"])
def test_nvcc_takes_it(standard: str, tmp_path: Path) -> None:
    command = ("nvcc", "-arch=sm_90", f"-std={standard}", "--Werror", "all-warnings", "-cubin", "-o", "kernels.cubin")
    assert compiled(CHECKED + KERNELS, tmp_path, *command) == ""
    wrong = CHECKED.replace("== 48", "== 52")
    assert "View" in compiled(wrong, tmp_path, *command)  # the assertions are checked


def test_nvrtc_takes_it() -> None:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda.bindings is not installed")
    from cuda.bindings import nvrtc

    code, program = nvrtc.nvrtcCreateProgram((INCLUDE + GUIDE + KERNELS).encode(), b"kernels.cu", 0, [], [])
    assert code == 0
    options = [b"-arch=sm_90", f"-I{symmem.include_path()}".encode()]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert code == 0, log.decode()


def test_the_command_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["include-path"]) == 0
    assert Path(capsys.readouterr().out.strip(), "symmem.cuh").samefile(HEADER)

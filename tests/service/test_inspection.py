"""The inspection socket of a process: access control, failures, and its end."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import LONG
from programs import run_program

import symmem
from symmem.arena.arena import arenas_of
from symmem.backends import kernel_status, kernel_words
from symmem.backends.kernel_words import NBYTES, KernelWords
from symmem.backends.pending_waits import forget, note
from symmem.errors import InspectionError
from symmem.service import server as server_module
from symmem.service import socket_paths
from symmem.service.server import REQUEST_NBYTES, Server
from symmem.service.socket_paths import Name, job_id
from symmem.service.status import answer
from symmem.tools.live import processes
from symmem.tools.live.processes import ask_all

ASK = b'{"version": 1, "parts": []}\n'


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder that the tools look in; its path is short enough for a socket, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory(prefix="symmem-") as parent:
        place = Path(parent, "symmem")
        monkeypatch.setattr(processes, "directories", lambda: [place])
        yield place


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Server]]:
    made = []

    def start(answer: Callable[[Sequence[str]], dict[str, Any]] = answer) -> Server:
        made.append(Server(folder, answer))
        return made[-1]

    yield start
    for server in made:
        server.close()


def connect(server: Server) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(server.path))
    return client


def read_all(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read()


def ask(server: Server, request: bytes = ASK) -> Any:
    client = connect(server)
    client.sendall(request)
    return json.loads(read_all(client))


# Access control.


def test_only_its_user_can_reach_it(serve: Callable[..., Server], folder: Path) -> None:
    before = os.umask(0)
    try:
        server = serve()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert server.path.stat().st_mode & 0o777 == 0o600
    assert ask(server)["pid"] == os.getpid()


@pytest.mark.parametrize("kind", ["mode", "link", "owner"])
def test_a_directory_of_others_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "symmem"
    (tmp_path / "other").mkdir(mode=0o700)
    if kind == "link":
        place.symlink_to(tmp_path / "other")
    else:
        place.mkdir(mode=0o700)
    if kind == "mode":
        place.chmod(0o750)
    if kind == "owner":
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises((InspectionError, NotADirectoryError)):
        Server(place, answer)
    assert list(place.iterdir()) == []


def test_another_user_gets_nothing(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "peer_of", lambda _: (123, os.geteuid() + 1))
        for _ in range(200):
            assert read_all(connect(server)) == b""
    assert caplog.text.count("refused process 123") == 1
    assert ask(server)["version"] == 1


def test_the_tools_refuse_another_users_process(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    monkeypatch.setattr(processes, "peer_of", lambda _: (123, os.geteuid() + 1))
    (found,) = ask_all([])
    assert found.answer is None
    assert "user" in found.problem


# Failures.


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (b"\n", "not a request"),
        (b"{}\n", "not a request"),
        (b'{"version": 1, "parts": "groups"}\n', "not a request"),
        (b'{"version": 2, "parts": []}\n', "version 1, not 2"),
        (b'{"version": 1, "parts": ["passwords"]}\n', "passwords"),
        (b'{"version": 1, "parts": [{}]}\n', "unknown parts"),
        (b"x" * (REQUEST_NBYTES + 1), "not a request"),
        (b"[" * REQUEST_NBYTES + b"\n", "not a request"),
    ],
)
def test_what_is_no_request_is_told_so(request_: bytes, why: str, serve: Callable[..., Server]) -> None:
    server = serve()
    status = ask(server, request_)
    assert status["version"] == 1
    assert why in status["error"]
    assert "error" not in ask(server)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"")))
def test_garbage(data: bytes, serve: Callable[..., Server], garbled: list[Server]) -> None:
    if not garbled:
        garbled.append(serve())
    assert "error" in ask(garbled[0], data + b"\n")


@pytest.fixture
def garbled() -> list[Server]:
    return []


def test_a_client_that_asks_nothing_does_not_hold_up_the_next(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_READING", 0.05)
    server = serve()
    silent, halting = connect(server), connect(server)
    halting.sendall(ASK[:5])
    assert ask(server)["version"] == 1
    assert read_all(silent) == read_all(halting) == b""


def test_a_client_that_does_not_read_does_not_hold_up_the_next(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_WRITING", 0.05)
    server = serve(lambda parts: {"version": 1, "much": "x" * (0 if parts else 1 << 24)})
    deaf = connect(server)
    deaf.sendall(ASK)
    assert ask(server, b'{"version": 1, "parts": ["groups"]}\n')["much"] == ""
    assert not read_all(deaf).endswith(b"\n")


def test_a_client_that_goes_away(serve: Callable[..., Server]) -> None:
    server = serve()
    for request in (b"", ASK[:5], ASK):
        with connect(server) as client:
            client.sendall(request)
    assert ask(server)["version"] == 1


def test_an_answer_that_fails_is_told(serve: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    def fail(parts: Sequence[str]) -> dict[str, Any]:
        raise ZeroDivisionError("planted")

    server = serve(fail)
    for _ in range(2):
        assert "ZeroDivisionError: planted" in ask(server)["error"]
    assert "planted" in caplog.text
    (found,) = ask_all([])
    assert "planted" in found.problem


def test_many_clients(serve: Callable[..., Server]) -> None:
    server = serve()
    with ThreadPoolExecutor(12) as pool:
        assert {each["pid"] for each in pool.map(lambda _: ask(server), range(48))} == {os.getpid()}


# The end.


def test_close_leaves_nothing(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    server = Server(folder, answer)
    assert threading.active_count() == before[1] + 1
    assert ask(server)["version"] == 1
    server.close()
    assert list(folder.iterdir()) == []
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def output_of(program: str, runtime: Path, **environ: str) -> str:
    done = run_program(program, env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), **environ})
    assert done.returncode == 0, done.stderr
    return done.stdout


PROGRAM = """
import os, sys, threading
import torch.distributed as dist
import symmem
symmem.allocate(8, backend="host")
threads = [thread.name for thread in threading.enumerate()]
assert "symmem-inspection" not in threads, threads
group = symmem.Group.from_store(0, 1, dist.HashStore())
other = symmem.Group.from_store(0, 1, dist.HashStore())
from symmem.service import server
print([thread.name for thread in threading.enumerate()].count("symmem-inspection"))
print(server._server and server._server.path.exists())
sys.stdout.flush()
"""


def test_it_begins_with_a_group_and_ends_with_the_process(tmp_path: Path) -> None:
    assert output_of(PROGRAM, tmp_path).split() == ["1", "True"]
    assert list((tmp_path / "symmem").iterdir()) == []


def test_switched_off(tmp_path: Path) -> None:
    assert output_of(PROGRAM, tmp_path, SYMMEM_ENABLE="inspection(off)").split() == ["0", "None"]
    assert not (tmp_path / "symmem").exists()


def test_what_a_killed_process_left_is_removed(folder: Path, serve: Callable[..., Server]) -> None:
    """The tools remove it, and so does the next process that starts. The socket of a live process stays."""
    for remove in (lambda: ask_all([]), serve):
        output_of(PROGRAM + "os._exit(0)", folder.parent)
        left = [path for path in folder.iterdir() if Name.parse(path.name).pid != os.getpid()]  # type: ignore[union-attr]
        assert len(left) == 1
        remove()
        assert not left[0].exists()
    assert [each.pid for each in ask_all([])] == [os.getpid()]


def test_a_forked_child_leaves_it_to_its_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "directories", lambda: [folder])
    monkeypatch.setattr(server_module, "_settled", False)
    monkeypatch.setattr(server_module, "_server", None)
    server_module.begin()
    server = server_module._server
    assert server is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns if a process with threads forks
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            server_module.end()  # as at its exit
            if server.path.exists() and server._socket.fileno() < 0 and server_module._server is None:
                server_module._settled = False
                kept = symmem.Group.from_store(0, 1, dist.HashStore(), "of the child")
                found = {each.pid: each.answer for each in ask_all(["groups"])}
                mine = found[os.getpid()]
                if len(found) == 2 and mine and [group["name"] for group in mine["groups"]] == [kept.name]:
                    server_module.end()
                    code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(server)["pid"] == os.getpid()
    server.close()


# Answers.


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[symmem.Group]:
    made = symmem.Group.from_store(0, 1, dist.HashStore(), request.node.name)
    yield made
    made.close()


def status_of(group: symmem.Group, *parts: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = json.loads(json.dumps(answer(["groups", "tensors", *parts])))
    tensors = [each for each in found["tensors"] if group.name in (each["group"], *each["groups"])]
    return next(each for each in found["groups"] if each["name"] == group.name), tensors


def test_live_tensors(group: symmem.Group) -> None:
    first = symmem.allocate((2, 3), torch.int16, group=group, backend="host", name="weight")
    own = symmem.allocate(5, torch.bool, group=group, backend="host", arena=False, name="own").rendezvous(group)
    symmem.allocate(7, group=group, backend="host")  # dropped at once
    _, tensors = status_of(group)
    assert [(each["name"], each["shape"], each["dtype"], each["nbytes"]) for each in tensors] == [
        ("weight", [2, 3], "int16", 12),
        ("own", [5], "bool", 5),
    ]
    assert all("test_live_tensors" in each["site"] and each["groups"] == [group.name] for each in tensors)
    assert (first.nbytes, own.nbytes) == (12, 5)


def test_an_arena_that_another_thread_holds_is_busy(group: symmem.Group) -> None:
    """The lock of an arena is taken, for example in a collective that hangs."""
    kept = symmem.allocate(8, torch.uint8, group=group, backend="host")
    assert [arena["busy"] for arena in status_of(group)[0]["arenas"]] == [False]
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with arenas_of(group)[0].log.lock:
            held.set()
            over.wait(LONG)

    thread = threading.Thread(target=hold, name="holds the arena")
    thread.start()
    held.wait(LONG)
    try:
        status, tensors = status_of(group)
        assert [(arena["busy"], arena["live_blocks"]) for arena in status["arenas"]] == [(True, 1)]
        assert len(tensors) == 1
        (stack,) = [each for each in answer(["stacks"])["stacks"] if each["name"] == "holds the arena"]
        assert any("over.wait(LONG)" in frame for frame in stack["frames"])
    finally:
        over.set()
        thread.join()
    assert kept.nbytes == 8


def test_a_closed_group_says_so(group: symmem.Group) -> None:
    assert not status_of(group)[0]["closed"]
    group.close()
    assert status_of(group)[0]["closed"]


def test_a_group_that_is_off_is_not_told_of(group: symmem.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", "inspection(off)")
    off = symmem.Group.from_store(0, 1, dist.HashStore(), "private")
    kept = symmem.allocate(8, group=off, backend="host")
    found = answer(["groups", "tensors"])
    assert "private" not in {each["name"] for each in found["groups"]} | {each["group"] for each in found["tensors"]}
    assert kept.nbytes


def test_waits_within_waits(group: symmem.Group) -> None:
    """A signal handler may wait during a wait."""
    outer = note(group, "outer", lambda: (0,), 1e9)
    inner = note(group, "inner", lambda: (0,), 1e9)
    assert [each["step"] for each in status_of(group)[0]["signals"]] == ["outer", "inner"]
    forget(inner)
    assert [each["step"] for each in status_of(group)[0]["signals"]] == ["outer"]
    forget(outer)
    forget(outer)
    assert status_of(group)[0]["signals"] == []


def test_waits_of_kernels(group: symmem.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are listed as long as they report the wait again."""
    memory = (ctypes.c_uint32 * (NBYTES // 4))()
    words, other = KernelWords(5, ctypes.addressof(memory), 0), symmem.Group.from_store(0, 1, dist.HashStore(), "other")
    number, beats = [words.enter(each) for each in (other, group)][1], iter(range(1000, 2000, 100))

    def tell(_seconds: float) -> None:
        memory[4:8] = [1 << 24 | number, 3 << 16 | 0, next(beats), 500]

    monkeypatch.setattr(kernel_words, "time", SimpleNamespace(sleep=tell, monotonic=time.monotonic))
    tell(0)
    try:
        for seconds in (1.1, 1.2):
            (status,) = status_of(group)[0]["signals"]
            assert (status["step"], status["waits_for"], status["device"]) == ("barrier on channel 3", [0], "cuda:5")
            assert status["seconds"] == pytest.approx(seconds * 2**20 / 1e6, abs=0.05)
            assert 0 < status["seconds_left"] < 0.53
        monkeypatch.undo()
        assert status_of(group)[0]["signals"] == []
    finally:
        kernel_status.devices.remove(words)
        other.close()


def test_what_changes_meanwhile_is_read_again() -> None:
    """Groups are made and deleted during an answer."""
    over = threading.Event()

    def churn() -> None:
        while not over.is_set():
            with contextlib.suppress(RuntimeError):
                symmem.Group.from_store(0, 1, dist.HashStore(), "churned").close()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(200):
            answer(["groups"])
    finally:
        over.set()
        thread.join()


# Names.


@given(st.text(max_size=80), st.integers(1, 2**31), st.integers(0, 2**32 - 1))
def test_names_can_be_read_again(job: str, pid: int, chance: int) -> None:
    name = Name(job, pid, f"{chance:08x}")
    assert "/" not in str(name)
    assert len(os.fsencode(socket_paths.at(1000, f".{name}"))) < 108  # the limit of an address, see unix(7)
    assert Name.parse(str(name)) == Name(name.label, pid, name.chance)


@given(st.text(max_size=40))
def test_other_names_are_no_sockets(text: str) -> None:
    name = Name.parse(text)
    assert name is None or str(name) == text


def test_jobs() -> None:
    assert job_id({}) == f"parent {os.getppid()}"
    environ = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert job_id(environ) == "node1:29500"
    environ["TORCHELASTIC_RUN_ID"] = "none"
    assert job_id(environ) == "node1:29500"
    environ["TORCHELASTIC_RUN_ID"] = "run 7"
    assert job_id(environ) == "run 7"
    environ["SLURM_JOB_ID"] = "4711"
    assert job_id(environ) == "4711"
    assert job_id({**environ, "SYMMEM_JOB_ID": "mine"}) == "mine"

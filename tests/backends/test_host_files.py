"""Memory files of the host backend: no holder of a descriptor can shorten them."""

from __future__ import annotations

import fcntl
import gc
import os
from typing import Any

import pytest
import torch
from thread_ranks import open_files

from symmem.backends import get_backend, libc
from symmem.backends.descriptors import Contribution, Received
from symmem.backends.host import HostBackend
from symmem.backends.memory_files import make_memory_file
from symmem.errors import RendezvousError


def test_the_size_of_a_memory_file_is_final() -> None:
    backend = get_backend("host")
    assert isinstance(backend, HostBackend)
    allocation = backend.allocate(100, torch.device("cpu"), None)
    for nbytes in (0, 1, allocation.extent + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(allocation.descriptor, nbytes)
    with pytest.raises(PermissionError):  # nor can a holder forbid writing
        fcntl.fcntl(allocation.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert allocation.tensor().sum() == 0


class OneRank:
    """A collective operation of a group with one rank, which receives the given files."""

    def __init__(self, memory: int, pad: int) -> None:
        self.group: Any = type("Group", (), {"rank": 0, "size": 1})()
        self.files = memory, pad

    def exchange(self, step: str, payload: bytes, descriptors: list[int]) -> Received:
        files = [given if file < 0 else file for file, given in zip(self.files, descriptors, strict=True)]
        return Received([Contribution(b"", libc.duplicate(files))])


@pytest.mark.parametrize("place", ["memory", "pad"])
@pytest.mark.parametrize("kind", ["unsealed", "short", "no memory file"])
def test_a_file_that_could_be_shortened_is_not_mapped(kind: str, place: str) -> None:
    backend = get_backend("host")
    allocation = backend.allocate(3 * libc.PAGE, torch.device("cpu"), None)
    file = os.open("/dev/zero", os.O_RDWR) if kind == "no memory file" else os.memfd_create("x", os.MFD_ALLOW_SEALING)
    if kind != "no memory file":
        os.ftruncate(file, 64 * libc.PAGE if kind == "unsealed" else 1)
    if kind == "short":
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    collective: Any = OneRank(*((file, -1) if place == "memory" else (-1, file)))
    with pytest.raises(
        RendezvousError, match=r"rank 0 sent a memory file that is shorter than .* or not sealed"
    ) as got:
        backend.rendezvous(allocation, collective)
    assert got.value.peers == (0,)
    os.close(file)


@pytest.mark.parametrize("call", ["ftruncate", "fcntl"])
def test_an_interrupted_memory_file_is_closed(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    gc.collect()  # the errors of earlier tests hold allocations
    before = open_files()
    monkeypatch.setattr(os if call == "ftruncate" else fcntl, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_memory_file(4096)
    assert open_files() == before


def test_a_memory_file_closes_with_its_last_reference() -> None:
    gc.collect()
    before = open_files()
    file = make_memory_file(4096)
    assert len(open_files() - before) == 1
    file.close()
    file.close()
    assert open_files() == before
    make_memory_file(4096)
    assert open_files() == before

"""A barrier that is interrupted, with ranks as threads over the pads of one process."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from symmem.backends import signals
from symmem.backends.signals import SharedSignals
from symmem.errors import PeerLostError, PeerTimeoutError, RendezvousError

SIZE = 3


def make() -> tuple[list[SharedSignals], list[int]]:
    """The signals of all ranks, and the list of lost ranks."""
    lost: list[int] = []
    words = [(ctypes.c_uint32 * (SharedSignals.nbytes(SIZE) // 4))() for _ in range(SIZE)]
    pads = [ctypes.addressof(pad) for pad in words]
    groups: list[Any] = [SimpleNamespace(rank=r, size=SIZE, name="threads", lost=lambda: lost) for r in range(SIZE)]
    return [SharedSignals(group, pads, words) for group in groups], lost


def interrupt(one: SharedSignals, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    """Interrupt a barrier of this rank in its sleep."""

    def interrupted(*args: object) -> None:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(signals, "futex_wait", interrupted)
        with pytest.raises(kind):
            one.barrier(5, 10.0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interrupted_barrier_is_not_counted_twice(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks raise, at their first call or a later call, and name the cause."""
    (first, second, third), lost = make()
    interrupt(first, monkeypatch, kind)
    texts = []
    for one in (first, third, second, third, first):
        with pytest.raises(RendezvousError) as caught:
            one.barrier(5, 10.0)
        assert type(caught.value) is RendezvousError
        assert caught.value.peers == (0,)
        texts.append(str(caught.value))
    assert "rank 0 gave up a barrier on this channel when it was interrupted in it" in texts[0]
    assert "rank 0 gave up a barrier on this channel when it was interrupted in it" in texts[1]
    assert "rank 2 gave up a barrier on this channel when rank 0 was interrupted in it" in texts[2]
    lost.append(0)
    with pytest.raises(PeerLostError, match="when it died"):
        first.barrier(5, 10.0)


def test_all_that_wait_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *others), _lost = make()
    raised: list[type[BaseException]] = []

    def wait(one: SharedSignals) -> None:
        try:
            one.barrier(5, 20.0)
        except RendezvousError as error:
            raised.append(type(error))

    threads = [threading.Thread(target=wait, args=(one,), daemon=True) for one in others]
    interrupt(first, monkeypatch, KeyboardInterrupt)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert raised == [RendezvousError, RendezvousError]


def test_a_timeout_is_still_told_as_one() -> None:
    (first, second, _), _lost = make()
    with pytest.raises(PeerTimeoutError):
        first.barrier(5, 0.05)
    with pytest.raises(PeerTimeoutError, match="did not come in time"):
        second.barrier(5, 0.05)

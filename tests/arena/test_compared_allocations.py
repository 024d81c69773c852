"""Allocations that differ are found by default, before wrong memory is used; legal programs raise nothing."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from told import Told, told
from torch._subclasses.fake_tensor import FakeTensorMode

import symmem
from symmem.arena.allocation_log import AllocationLog
from symmem.arena.arena import arenas_of, compare_arenas
from symmem.errors import DivergenceError, ForkedError, PeerTimeoutError
from symmem.group import join
from symmem.group.ledger import RING, ActSequence
from symmem.group.transports import Message, SocketTransport
from symmem.tools.ranks import RankPool, rank_store

pytestmark = pytest.mark.ranks

WORLD = 3
FILE = Path(__file__).name
LONG = 240.0  # a test that waits that long has failed


@pytest.fixture
def pool(living_pool: Callable[..., RankPool]) -> RankPool:
    return living_pool(WORLD, process_group=None, env={"SYMMEM_ENABLE": f"signal_timeout({LONG}s)"})


def own_rank() -> int:
    return int(os.environ["RANK"])


def group_of(name: str, ranks: tuple[int, ...] = (0, 1)) -> symmem.Group | None:
    """A new group of some ranks; None on the others."""
    rank = own_rank()
    return symmem.Group.from_store(ranks.index(rank), len(ranks), rank_store(), name) if rank in ranks else None


def meet(group: symmem.Group, step: str) -> None:
    """Wait for the other ranks, as a program does that uses another library. An error of symmem stops no rank."""
    rank_store().set(f"{group.name} {step} {group.rank}", "")
    rank_store().wait([f"{group.name} {step} {rank}" for rank in range(group.size)])


def allocate(group: symmem.Group, count: int = 1000, **options: object) -> symmem.SymmetricTensor:
    return symmem.allocate(count, torch.float32, group=group, backend="host", **options)  # type: ignore[arg-type]


def one_more(group: symmem.Group) -> object:
    return allocate(group).tensor.fill_(777) if group.rank == 0 else None


def one_more_dropped_at_once(group: symmem.Group) -> None:
    if group.rank == 0:
        allocate(group)


def another_size(group: symmem.Group) -> object:
    return allocate(group, 1000 if group.rank == 0 else 5000).tensor.fill_(777)


def redirected(group: symmem.Group) -> object:
    with symmem.use_symmetric_memory(group) if group.rank == 0 else contextlib.nullcontext():
        return torch.ones(1000) * 2


def entered(group: symmem.Group) -> None:
    if group.rank == 0:
        with symmem.use_symmetric_memory(group):
            pass


DIFFERENCES: dict[str, Callable[[symmem.Group], object]] = {
    each.__name__: each for each in (one_more, one_more_dropped_at_once, another_size, redirected, entered)
}


def value(st: symmem.SymmetricTensor) -> float:
    return st.remote_tensor(1 - own_rank())[0].item()


def pointers(st: symmem.SymmetricTensor) -> float:
    st.device_view()
    raise AssertionError(f"pointers were given out: {st.remote_pointers}")


def signals(st: symmem.SymmetricTensor) -> float:
    st.put_signal(1 - own_rank())
    st.wait_signal(1 - own_rank())
    raise AssertionError("a signal has arrived")


def barrier(st: symmem.SymmetricTensor) -> float:
    st.barrier()
    raise AssertionError("the barrier has passed")


USES: dict[str, Callable[[symmem.SymmetricTensor], float]] = {
    each.__name__: each for each in (value, pointers, signals, barrier)
}


def diverge(kind: str, use: str) -> list[Told]:
    """The errors that one rank of the program gets, in order. It reads no wrong value."""
    group = group_of(f"{kind} {use}")
    if group is None:
        return []
    before = allocate(group, 8)
    found = [told(before.barrier)]
    kept: list[object] = []
    st: list[symmem.SymmetricTensor] = []

    def allocate_both() -> None:
        kept.append(DIFFERENCES[kind](group))
        st.append(allocate(group))
        st[0].tensor.fill_(group.rank + 1)

    found.append(told(allocate_both))
    meet(group, "allocated")

    def use_it() -> None:
        assert USES[use](st[0]) == 2 - group.rank

    if st:
        found.append(told(use_it))
    for _ in range(2):  # the ranks are in step again, with another arena
        found.append(told(lambda: check_a_new_one(group)))
    before.tensor.fill_(group.rank + 10)
    found.append(told(before.barrier))
    with pytest.MonkeyPatch.context() as patch:  # the ledger has the acts of the new arena, so none of them is awaited
        patch.setattr(ActSequence, "await_ranks", lambda *_: pytest.fail("it waits"))
        assert value(before) == 11 - group.rank
        assert before.remote_pointers.numel() == group.size
    if st:
        with pytest.raises(DivergenceError, match="cannot be used because the ranks have diverged"):
            use_it()
    found.append(told(lambda: meet_in(group)))
    group.close()
    return found


def check_a_new_one(group: symmem.Group) -> None:
    st = allocate(group)
    st.tensor.fill_(group.rank + 1)
    st.barrier()
    assert value(st) == 2 - group.rank
    st.barrier()


def meet_in(group: symmem.Group) -> None:
    with group.collective("meet"):
        pass


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_allocations_that_differ_are_told_before_peers_memory_is_used(kind: str, use: str, pool: RankPool) -> None:
    for found in pool.run(diverge, kind, use)[:2]:
        first, *between = found[:-4]
        assert not any(each.kind for each in (first, *found[-4:])), found
        (error,) = (each for each in between if each.kind)  # every rank is told once
        assert error.kind == "DivergenceError", found
        assert "allocation 2: " in error.text
        assert "rank 0" in error.text
        assert "rank 1" in error.text
        assert FILE in error.text
        assert f"in {kind}" in error.text or "in redirected" in error.text


def wait_for_a_rank_that_diverges(step: str) -> Told:
    group = group_of(f"waits at {step}")
    if group is None:
        return Told(kind="", text="")
    st = allocate(group, 8)
    st.barrier()

    def go() -> None:
        if group.rank == 0:
            kept = allocate(group, 9)
            rank_store().set(f"{group.name} is about to wait", "")
            {"barrier": st.barrier, "wait_signal": lambda: st.wait_signal(1), "collect": lambda: symmem.collect(group)}[
                step
            ]()
            del kept
        else:
            rank_store().wait([f"{group.name} is about to wait"])
            allocate(group, 10)
            rank_store().wait([f"{group.name} was released"])
            allocate(group, 11).remote_tensor(0)

    result = told(go)
    rank_store().set(f"{group.name} was released", "")
    group.close()
    return result


@pytest.mark.parametrize("step", ["barrier", "wait_signal", "collect"])
def test_a_rank_that_waits_is_released(step: str, pool: RankPool) -> None:
    for result in pool.run(wait_for_a_rank_that_diverges, step)[:2]:
        assert result.kind == "DivergenceError", result
        assert result.took < LONG / 2


VIEWS: dict[str, Callable[[symmem.SymmetricTensor], object]] = {
    "remote_tensor": lambda st: st.remote_tensor(0),
    "contiguous_view": lambda st: st.contiguous_view(),
    "remote_pointers": lambda st: st.remote_pointers,
    "signal_pad": lambda st: st.signal_pad(0),
}


def view_before_the_other_rank_allocates(view: str, is_equal: bool) -> list[Told]:
    group = group_of(f"{view} {is_equal}")
    if group is None:
        return []
    allocate(group, 8).barrier()
    found = []
    if group.rank == 1:
        st = allocate(group, name="the same on both ranks")
        VIEWS[view](st)
    meet(group, "viewed")
    if group.rank == 0:
        kept: list[symmem.SymmetricTensor] = []

        def allocate_it() -> None:
            kept.append(allocate(group, 1000 if is_equal else 3000, name="the same on both ranks"))

        found.append(told(allocate_it))
    meet(group, "allocated")
    if group.rank == 1:
        found.append(told(lambda: st.remote_tensor(0)))
    found.append(told(lambda: check_a_new_one(group)))
    group.close()
    return found


@pytest.mark.parametrize("is_equal", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_a_rank_does_not_go_on_if_another_has_a_view_of_the_wrong_memory(
    view: str, is_equal: bool, pool: RankPool
) -> None:
    """The allocation raises. If it returned, a program could let the other rank read."""
    for first, after in pool.run(view_before_the_other_rank_allocates, view, is_equal)[:2]:
        assert (first.kind, after.kind) == ("" if is_equal else "DivergenceError", ""), (first, after)


def operator_while_another_begins_its_arena_again() -> list[Told]:
    group = group_of("released operator")
    if group is None:
        return []
    x = torch.ones(4)
    for _ in range(2):
        symmem.ops.all_reduce(x, group)
    allocate(group, 8).barrier()
    st = allocate(group, 8 if group.rank else 700)
    meet(group, "allocated")

    found = [told(lambda: st.remote_tensor(1) if group.rank == 0 else symmem.ops.all_reduce(x, group))]
    for _ in range(4):  # the first allocation of rank 0 waits for the other rank
        found.append(told(lambda: symmem.ops.all_reduce(allocate(group, 4).tensor.fill_(1), group)))
    group.close()
    return found


def test_an_operator_does_not_wait_for_a_rank_that_begins_its_arena_again(pool: RankPool) -> None:
    for first, *_, last in pool.run(operator_while_another_begins_its_arena_again)[:2]:
        assert first.took < LONG / 2
        assert (first.kind, last.kind) == ("DivergenceError", ""), (first, last)


def differ_far_apart() -> Told:
    """Rank 0 has overwritten the differing act before the others come to it, and then they stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", os.environ["SYMMEM_ENABLE"] + ",arena_size(512MiB)")
        group = group_of("far apart", (0, 1, 2))
    assert group is not None
    first = allocate(group, 8)
    first.barrier()
    if group.rank:
        rank_store().wait(["rank 0 was here"])
    kept = [
        allocate(group, 8 if count != 5 or group.rank else 700)
        for count in range(RING // 8 if group.rank else 3 * RING)
    ]
    if not group.rank:
        rank_store().set("rank 0 was here", "")
    rank_store().add("through", 1)
    while rank_store().add("through", 0) < 3:
        time.sleep(0.01)
    result = told(lambda: kept[7].remote_tensor((group.rank + 1) % 3))
    group.close()
    return result


def test_a_rank_that_ran_far_ahead_is_told_before_it_reads(pool: RankPool) -> None:
    assert pool.run(differ_far_apart)[0].kind == "DivergenceError"


def operate_after_a_difference() -> list[Told]:
    group = group_of("operators")
    if group is None:
        return []
    symmem.ops.all_reduce(allocate(group, 8).tensor, group)  # the first operation is a meeting, which raises
    kept = allocate(group, 1000) if group.rank == 0 else None
    x, all_x = allocate(group, 500), allocate(group, 1000)
    x.tensor.fill_(group.rank + 1)

    def go() -> None:
        symmem.ops.all_gather(x.tensor, group, out=all_x.tensor.view(2, 500))
        assert all_x.tensor.tolist() == [1.0] * 500 + [2.0] * 500
        symmem.ops.all_reduce(x.tensor, group, out=x.tensor)
        assert x.tensor.eq(3).all()

    found = [told(go), told(lambda: use(x))]
    del kept
    group.close()
    return found


def test_operators_are_right_after_a_difference(pool: RankPool) -> None:
    for operated, used in pool.run(operate_after_a_difference)[:2]:
        assert (operated.kind, used.kind) == ("", "DivergenceError")


def allocate_after_another_rank_has_raised() -> list[Told]:
    group = group_of("raised")
    if group is None:
        return []
    first = allocate(group, 8)
    first.barrier()
    st = allocate(group, 8 if group.rank else 700)
    meet(group, "allocated")
    found = [told(lambda: allocate(group, 9))]  # it is logged
    meet(group, "allocated again")
    if group.rank:
        found.append(told(lambda: st.remote_tensor(0)))
    meet(group, "rank 1 has raised")
    if not group.rank:
        found.append(told(lambda: allocate(group, 10)))
    found.append(told(lambda: check_a_new_one(group)))
    group.close()
    return found


def test_an_allocation_raises_if_another_rank_has_raised(pool: RankPool) -> None:
    """That rank's next allocation waits for the other, which would wait for it elsewhere."""
    for logged, raised, after in pool.run(allocate_after_another_rank_has_raised)[:2]:
        assert (logged.kind, raised.kind, after.kind) == ("", "DivergenceError", ""), (logged, raised, after)


def allocate_after_an_operator_has_raised() -> list[Told]:
    group = group_of("raised by an operator")
    if group is None:
        return []
    allocate(group, 8).barrier()
    st = allocate(group, 8 if group.rank else 700)
    meet(group, "allocated")
    found = []
    if group.rank:
        found.append(told(lambda: compare_arenas(group)))  # as an operator does after its timeout
    meet(group, "rank 1 has raised")
    if not group.rank:
        found.append(told(lambda: allocate(group, 10)))
        found.append(told(lambda: st.remote_tensor(1)))
    found.append(told(lambda: check_a_new_one(group)))
    group.close()
    return found


def test_an_allocation_does_not_raise_if_an_operator_has_raised_elsewhere(pool: RankPool) -> None:
    """The operator fails on all ranks. A rank that left it out would not be in step."""
    first, second, _ = pool.run(allocate_after_an_operator_has_raised)
    assert [each.kind for each in first] == ["", "DivergenceError", ""], first
    assert [each.kind for each in second] == ["DivergenceError", ""], second


def diverge_often(meetings: bool) -> list[Told]:
    """Diverge more often than there are sequences, also while the ranks meet to begin again."""
    group = group_of(f"often {meetings}")
    if group is None:
        return []
    first = allocate(group, 8)
    first.barrier()
    found = []
    for turn in range(20):
        found.append(told(lambda turn=turn: use(allocate(group, 16 + group.rank + 10 * turn))))  # type: ignore[misc]
        if meetings:
            found.append(told(lambda turn=turn: allocate(group, 300 + group.rank + turn)))  # type: ignore[misc]
        check_a_new_one(group)
    first.tensor.fill_(group.rank + 1)
    first.barrier()
    assert value(first) == 2 - group.rank
    assert arenas_of(group)[0].log.acts is not None
    found.append(told(lambda: use(allocate(group, 16 + group.rank))))
    check_a_new_one(group)
    group.close()
    return found


def use(st: symmem.SymmetricTensor) -> None:
    """Be told, if the other rank has not told this one before."""
    st.barrier()
    raise AssertionError("the barrier has passed")


@pytest.mark.parametrize("meetings", [False, True])
def test_ranks_may_diverge_again_and_again(meetings: bool, pool: RankPool) -> None:
    for found in pool.run(diverge_often, meetings)[:2]:
        assert {each.kind for each in found} == {"DivergenceError"}, found
        assert len(found) == (41 if meetings else 21)


def interrupt_a_growth(where: str, victim: int) -> tuple[list[str], bool]:
    """One rank is interrupted where the others have made the segment, or are about to."""
    group = group_of(f"growth {where} {victim}")
    if group is None:
        return [], True
    before = allocate(group, 8)
    before.barrier()
    size = 17 << 20  # more than a segment has
    found = []
    handler = signal.signal(signal.SIGALRM, interrupted)

    def go() -> None:
        st = allocate(group, size)  # the arena grows
        rank_store().set(f"{group.name} rank {group.rank} has allocated", "")
        st.tensor[:1] = group.rank + 1
        st.barrier()
        assert value(st) == 2 - group.rank
        st.barrier()

    for turn in range(3):
        with pytest.MonkeyPatch.context() as patch:
            if turn == 0 and group.rank == victim:
                if where == "agreement":
                    name = "submit" if victim else "publish"
                    send = functools.partial(send_and_stop, getattr(SocketTransport, name))
                    patch.setattr(SocketTransport, name, lambda *args, send=send: send(*args))
                else:
                    patch.setattr(AllocationLog, where, interrupted)
            try:
                found.append(told(go).kind)
            except Interrupt:
                found.append("Interrupt")
    signal.signal(signal.SIGALRM, handler)
    before.tensor.fill_(group.rank + 1)
    before.barrier()
    right = value(before) == 2 - group.rank
    group.close()
    return found, right


def send_and_stop(send: Callable[..., object], transport: SocketTransport, message: Message) -> None:
    send(transport, message)
    if message.step == "grow an arena: agree" and not message.error:
        if own_rank():
            rank_store().wait([f"growth agreement {own_rank()} rank 0 has allocated"])
        signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("where", ["agreement", "add_segment"])
def test_an_interrupt_at_the_end_of_a_growth(where: str, victim: int, pool: RankPool) -> None:
    for rank, (found, right) in enumerate(pool.run(interrupt_a_growth, where, victim)[:2]):
        assert found == ["Interrupt" if rank == victim else "DivergenceError", "", ""], found
        assert right


def skip_one_in_a_loop() -> list[Told]:
    """Rank 1 skips an allocation. All that follow are on the same line, so the ranks are one apart unnoticed."""
    group = group_of("one apart")
    if group is None:
        return []
    st = allocate(group, 8)
    found = []

    def go(turn: int) -> None:
        nonlocal st
        if turn != 2 or group.rank == 0:
            st = allocate(group, 8)
        symmem.ops.all_reduce(torch.ones(4), group)
        st.barrier(timeout=2.0 if turn == 2 else None)

    for turn in range(6):
        found.append(told(lambda turn=turn: go(turn)))  # type: ignore[misc]
    group.close()
    return found


def test_ranks_that_are_one_allocation_apart_are_told_at_a_timeout_and_begin_again(pool: RankPool) -> None:
    for found in pool.run(skip_one_in_a_loop)[:2]:
        assert [each.kind for each in found] == ["", "", "DivergenceError", "", "", ""], found
        assert re.search(
            "rank . has made (3|4), rank . has made (3|4) and waits in barrier on channel 0", found[2].text
        )


def skip_one_and_meet() -> list[Told]:
    """All ranks wait for each other after every step, whatever came of it."""
    found: list[Told] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", "rendezvous_timeout(5s)")
        if (group := group_of("skipped before a meeting")) is None:
            return found
    allocate(group).barrier()
    for turn in range(8):
        meet(group, f"turn {turn}")
        if turn or group.rank:
            found.append(told(lambda: allocate(group, name="x").barrier(timeout=0.5)))
    return found


def test_ranks_that_are_one_allocation_apart_come_to_work_although_they_meet_elsewhere(pool: RankPool) -> None:
    *ranks, _ = pool.run(skip_one_and_meet, timeout=LONG)
    assert any(each.kind == "DivergenceError" and "different numbers" in each.text for each in ranks[1])
    assert [each.kind for found in ranks for each in found[-2:]] == [""] * 4


def diverge_after_a_skipped_call(alone: int) -> list[Told]:
    group = group_of(f"skipped by all but {alone}", (0, 1, 2))
    assert group is not None
    before = allocate(group, 8)
    before.barrier()
    found = []
    if group.rank == alone:
        found.append(told(lambda: symmem.collect(group, timeout=1.0)))
    meet(group, "collected")
    for turn in range(2):  # the first to allocate is told in the second turn
        for rank in range(group.size):
            meet(group, f"turn {turn} of {rank}")
            if group.rank == rank and not any(each.kind == "DivergenceError" for each in found):
                found.append(told(lambda: allocate(group, 8 if group.rank else 72).remote_tensor(0)))
    meet(group, "told")
    for _ in range(2):
        found.append(told(lambda: allocate(group, 8).barrier()))
    group.close()
    return found


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_a_divergence_after_a_skipped_call_is_told_once(alone: int, pool: RankPool) -> None:
    for rank, found in enumerate(pool.run(diverge_after_a_skipped_call, alone)):
        kinds = [each.kind for each in found if each.kind]
        assert kinds == ["PeerTimeoutError"] * (rank == alone) + ["DivergenceError"], found
        assert [each.kind for each in found[-2:]] == ["", ""]


class Interrupt(BaseException):
    pass


def refuse_a_rendezvous(how: str) -> tuple[Told, Told]:
    group = group_of(f"refuse {how}")
    if group is None:
        return Told(kind="", text=""), Told(kind="", text="")
    allocate(group, 8).barrier()
    st = allocate(group, 8, arena=False)

    def go() -> None:
        if group.rank == 0:
            st.rendezvous(group)
        elif how == "timeout":
            st.rendezvous(group, timeout=-1)
        elif how == "closed":
            st.close()
            st.rendezvous(group)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("symmem.tensor.tensor.check_open", interrupted)
                st.rendezvous(group)

    try:
        first = told(go)
    except Interrupt:
        first = Told(kind="Interrupt", text="")
    second = told(lambda: allocate(group, 8, arena=False).rendezvous(group).barrier())
    group.close()
    return first, second


def interrupted(*_: object) -> None:
    raise Interrupt


@pytest.mark.parametrize(
    ("how", "error"),
    [("timeout", "InvalidArgumentError"), ("closed", "ClosedError"), ("interrupt", "RendezvousError")],
)
def test_a_refused_rendezvous_is_refused_on_all_ranks(how: str, error: str, pool: RankPool) -> None:
    """Also if it is refused before the ranks would have met."""
    for rank, (first, second) in enumerate(pool.run(refuse_a_rendezvous, how)[:2]):
        assert first.kind == ("Interrupt" if rank and how == "interrupt" else error), first
        assert not second.kind, second


# Legal programs.


def threads() -> None:
    """A thread for every arena; the threads run in another order on every rank."""
    groups = [group_of(f"threads {index}", (0, 1, 2)) for index in range(4)]
    for group in groups:
        assert group is not None
        allocate(group, 8).barrier()
    failed: list[BaseException] = []

    def run(group: symmem.Group, seed: int) -> None:
        try:
            chance = random.Random(seed)
            for count in range(3 * RING):
                allocate(group, chance.randrange(1, 50))
                if count % 500 == 0:
                    symmem.collect(group)
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=run, args=(group, seed)) for seed, group in enumerate(groups)]
    random.shuffle(running)
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failed, failed
    for group in groups:
        assert group is not None
        group.close()


def overlapping_groups() -> None:
    members = [(0, 1), (1, 2), (0, 2), (0, 1, 2)]
    groups = [group for index, ranks in enumerate(members) if (group := group_of(f"overlap {index}", ranks))]
    for group in groups:
        allocate(group, 8).barrier()
    kept = []
    for _ in range(10):
        random.shuffle(groups)  # the order among groups is each rank's own
        for group in groups:
            kept += [allocate(group, size) for size in range(1, 30)]
    for group in sorted(groups, key=lambda each: each.name):
        allocate(group, 8).barrier()
        group.close()


def local_calls() -> None:
    """Calls on fake and meta tensors, own memory, and arenas of other groups, on one rank only."""
    group = group_of("local", (0, 1, 2))
    assert group is not None
    st = allocate(group, 8)
    st.barrier()
    if group.rank == 1:
        alone = symmem.Group.from_store(0, 1, rank_store(), "alone")
        kept = [allocate(group, 100, arena=False), allocate(alone, 100)]
        symmem.ops.all_gather(torch.ones(4, device="meta"), group)
        with FakeTensorMode() as mode:
            symmem.ops.all_reduce(mode.from_tensor(torch.ones(4)), group)
        st.remote_tensor(0)
        assert symmem.find(st.tensor) is not None
        del kept
        alone.close()
    for _ in range(10):
        allocate(group, 8)
    allocate(group, 8).barrier()
    group.close()


def far_ahead() -> None:
    """One rank is ahead by more than the ring. It has no word of the others to compare with until they come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", os.environ["SYMMEM_ENABLE"] + ",arena_size(512MiB)")
        group = group_of("ahead", (0, 1, 2))
    assert group is not None
    allocate(group, 8).barrier()
    if group.rank:
        rank_store().wait(["rank 0 is ahead"])
    for count in range(3 * RING):
        allocate(group, count % 7)
    if not group.rank:
        rank_store().set("rank 0 is ahead", "")
    allocate(group, 8).barrier()
    group.close()


def forked_children() -> None:
    group = group_of("forked", (0, 1, 2))
    assert group is not None
    allocate(group, 8).barrier()
    for _ in range(3 if group.rank == 1 else 0):
        child = os.fork()
        if child == 0:
            try:
                allocate(group, 99)
            except ForkedError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for _ in range(10):
        allocate(group, 8)
    allocate(group, 8).barrier()
    group.close()


def polling() -> None:
    """Rank 0 polls for a signal while rank 1 is an allocation ahead, and waits for rank 2."""
    group = group_of("polling", (0, 1, 2))
    assert group is not None
    st = allocate(group, 8)
    st.barrier()
    if group.rank == 0:
        rank_store().wait(["rank 1 is ahead"])
        for _ in range(3):
            with pytest.raises(PeerTimeoutError):
                st.wait_signal(1, timeout=0.2)
        rank_store().set("rank 0 has polled", "")
        st.wait_signal(1)
        ahead = allocate(group, 8, name="ahead")
    elif group.rank == 1:
        ahead = allocate(group, 8, name="ahead")
        rank_store().set("rank 1 is ahead", "")
        ahead.wait_signal(2)
        st.put_signal(0)
    else:
        rank_store().wait(["rank 0 has polled"])
        ahead = allocate(group, 8, name="ahead")
        ahead.put_signal(1)
    ahead.barrier()
    group.close()


def named_on_different_lines() -> None:
    group = group_of("named", (0, 1, 2))
    assert group is not None
    allocate(group, 8).barrier()
    kept = [allocate(group, 16, name="weights")] if group.rank else []
    kept += [] if group.rank else [allocate(group, 16, name="weights")]
    kept[0].barrier()
    assert arenas_of(group)[0].log.count == 2
    group.close()


@pytest.mark.parametrize(
    "program",
    [threads, overlapping_groups, local_calls, far_ahead, forked_children, polling, named_on_different_lines],
)
def test_a_legal_program_raises_nothing(program: Callable[[], None], pool: RankPool) -> None:
    assert pool.run(program, timeout=LONG) == [None] * WORLD


# What must agree when a group joins.


def join_with(what: str) -> Told:
    odd = own_rank() == 1
    if what == "version":
        vars(join)["VERSION"] = "0.0.9" if odd else "0.0.8"
    else:
        os.environ["SYMMEM_ENABLE"] = f"{what}(each)" if odd else "rendezvous_timeout(60s)"
    group = group_of(f"join {what}", (0, 1, 2))
    assert group is not None
    result = told(lambda: allocate(group, 8))
    group.close()
    return result


@pytest.mark.parametrize(
    ("what", "name", "values"),
    [
        ("version", "different versions", ["0.0.8", "0.0.9"]),
        ("allocation_check", "'allocation_check'", ["meeting", "each"]),
        ("collective_check", "'collective_check'", ["off", "each"]),
    ],
)
def test_what_must_agree_is_compared_when_the_ranks_join(
    what: str, name: str, values: list[str], new_pool: Callable[..., RankPool]
) -> None:
    for result in new_pool(WORLD, process_group=None).run(join_with, what):
        assert result.kind == "MismatchError", result
        assert name in result.text
        assert all(each in result.text for each in values), result.text


# What is compared when the ranks meet.


def rendezvous_of_other_sizes(group: symmem.Group) -> object:
    kept = [symmem.allocate(9, group=group, arena=False)] if not group.rank else []
    kept += [symmem.allocate(8, group=group, arena=False)] if group.rank else []
    return kept[0].rendezvous(group)


def other_steps(group: symmem.Group) -> object:
    return symmem.collect(group) if group.rank else allocate(group, 8, arena=False).rendezvous(group)


def meet_differently(function: Callable[[symmem.Group], object]) -> Told:
    group = group_of(function.__name__)
    if group is None:
        return Told(kind="", text="")
    allocate(group, 8).barrier()
    result = told(lambda: function(group))
    group.close()
    return result


@pytest.mark.parametrize("function", [rendezvous_of_other_sizes, other_steps])
def test_the_error_names_the_line_of_every_rank(function: Callable[[symmem.Group], object], pool: RankPool) -> None:
    first = function.__code__.co_firstlineno
    for result in pool.run(meet_differently, function)[:2]:
        assert result.kind == "MismatchError", result
        assert f"; called at {__file__}:" in result.text
        if function is other_steps:
            assert "'rendezvous: compare' on rank 0, 'collect: " in result.text
            assert f"{FILE}:{first + 1} in other_steps" in result.text
        else:
            assert "ranks disagree on 'shape': [9] on rank 0, [8] on rank 1" in result.text
            for rank in (0, 1):
                line = f"{FILE}:{first + 3} in {function.__name__}, allocated at {__file__}:{first + 1 + rank} in "
                assert f"{line}{function.__name__} on rank {rank}" in result.text


def wait_in(other: str) -> Told:
    """Rank 0 waits in a barrier; rank 1 waits for it elsewhere."""
    group = group_of(f"waits in {other}")
    if group is None:
        return Told(kind="", text="")
    st = allocate(group, 8)
    st.barrier()
    symmem.ops.all_reduce(torch.ones(4), group=group)

    def go() -> None:
        if group.rank == 0:
            st.barrier(timeout=2.0)
        elif other == "operation":
            symmem.ops.all_reduce(torch.ones(4), group=group)
        elif other == "signal":
            st.wait_signal(0, timeout=2.0)
        elif other == "collect":
            with group.collective("something else", timeout=30.0):
                pass
        else:
            st.barrier(channel=1, timeout=2.0)

    result = told(go)
    group.close()
    return result


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ("operation", "all_reduce(sum) of 4 torch.float32"),
        ("signal", "wait_signal on channel 0"),
        ("channel", "barrier on channel 1"),
        ("collect", "something else: agree"),
    ],
)
def test_ranks_that_wait_in_different_calls_are_told(other: str, text: str, new_pool: Callable[..., RankPool]) -> None:
    """At the timeout. The error names the call and the line of both, instead of blaming the peer."""
    pool = new_pool(2, process_group=None, env={"SYMMEM_ENABLE": "signal_timeout(2s)"})
    for result in pool.run(wait_in, other)[: 1 if other == "collect" else 2]:
        if result.rank == 1 and other == "signal":  # the peer of a signal may do something else meanwhile
            assert result.kind == "PeerTimeoutError", result
            assert f"; rank 0 waits in barrier on channel 0 at {__file__}:" in result.text
            continue
        if other == "collect":  # the ranks may go on there after the timeout
            assert result.kind == "PeerTimeoutError", result
            assert f"; rank 1 waits in something else: agree at {__file__}:" in result.text
            continue
        assert result.kind == "DivergenceError", result
        for rank, step in enumerate(["barrier on channel 0", text]):
            assert re.search(rf"{re.escape(step)} at \S*{FILE}:\d+ in go on rank {rank}", result.text), result.text

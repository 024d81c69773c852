"""The registry of live memory, behind ``symmem.find`` and ``wrap``."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from symmem.memory import registry
from symmem.memory.block import Block
from symmem.memory.layout import Layout
from symmem.memory.registry import block_at, register

BASE = 2**60  # no address of this process
SLOT, SLOTS = 8, 12
slots = st.integers(0, SLOTS - 1)


def block_of(pointer: int, nbytes: int) -> Block:
    allocation = SimpleNamespace(pointer=pointer, nbytes=nbytes)
    return Block(allocation, Layout((nbytes,), (1,), torch.uint8))  # type: ignore[arg-type]


class Mapping:
    """Anything that can be weakly referenced."""


class Book(RuleBasedStateMachine):
    """Blocks are dropped by reference count or by the collector, and addresses are reused."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Block] = {}  # by slot
        self.cyclic: dict[int, weakref.ref[Block]] = {}  # unreachable, but not collected yet

    @rule(slot=slots, nbytes=st.integers(0, SLOT))
    def make(self, slot: int, nbytes: int) -> None:
        if slot not in self.live and slot not in self.cyclic:
            self.live[slot] = block_of(BASE + slot * SLOT, nbytes)
            register(self.live[slot])

    @rule(slot=slots)
    def drop(self, slot: int) -> None:
        self.live.pop(slot, None)

    @rule(slot=slots)
    def drop_in_a_circle(self, slot: int) -> None:
        if slot in self.live:
            block = self.live.pop(slot)
            block.allocation.circle = block  # type: ignore[attr-defined]
            self.cyclic[slot] = weakref.ref(block)

    @precondition(lambda self: self.cyclic)
    @rule()
    def collect(self) -> None:
        gc.collect()
        assert all(reference() is None for reference in self.cyclic.values())
        self.cyclic.clear()

    @rule(slot=slots, byte=st.integers(0, SLOT - 1))
    def look_up(self, slot: int, byte: int) -> None:
        block = self.live.get(slot)
        if slot not in self.cyclic:
            holds = block is not None and byte < max(block.allocation.nbytes, 1)
            assert block_at(BASE + slot * SLOT + byte) is (block if holds else None)

    @invariant()
    def every_live_block_is_found(self) -> None:
        for block in self.live.values():
            assert block_at(block.allocation.pointer) is block

    @invariant()
    def nothing_is_found_outside(self) -> None:
        assert block_at(BASE - 1) is None
        assert block_at(BASE + SLOT * SLOTS) is None

    def teardown(self) -> None:
        self.live.clear()
        if self.cyclic:
            gc.collect()
        assert block_at(0) is None  # a look-up removes collected blocks
        assert [pointer for pointer in registry._pointers if pointer >= BASE] == []
        assert [pointer for pointer in registry._ranges if pointer >= BASE] == []
        assert [pointer for pointer in registry._sizes if pointer >= BASE] == []


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_an_address_that_is_used_again_belongs_to_the_new_block() -> None:
    old = block_of(BASE, 4)
    register(old)
    new = block_of(BASE, 4)
    register(new)
    del old
    assert block_at(BASE) is new
    del new
    assert block_at(BASE) is None


def test_a_finalizer_may_look_up_while_the_book_is_changed() -> None:
    """The collector can run, and with it a ``__del__`` that calls ``symmem.find``, while a thread holds the lock."""
    seen: list[Block | None] = []
    block = block_of(BASE, 4)
    register(block)

    class Finder:
        def __del__(self) -> None:
            seen.append(block_at(BASE))

    with registry._lock:
        Finder()
    assert seen == [block]


def test_a_closed_block_lets_go_of_peers() -> None:
    block = block_of(BASE, 4)
    mapping = Mapping()
    gone = weakref.ref(mapping)
    block.mappings["group"] = mapping  # type: ignore[index, assignment]
    del mapping
    block.close()
    assert block.closed
    assert gone() is None

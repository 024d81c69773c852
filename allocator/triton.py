"""Symmetric memory inside of Triton kernels: functions to call from a ``@triton.jit`` function.

    from symmem import triton as symm

    @triton.jit
    def kernel(x, pointers, signals, rank, world: tl.constexpr, ...):
        tl.store(x + offsets, ...)                                      # this rank's part
        symm.barrier(signals, tl.program_id(0), rank, world)            # block b meets block b of all other ranks
        theirs = symm.load(x + offsets, pointers, rank, peer, mask)     # the same elements, at a peer

    view = st.device_view()
    kernel[grid](st.tensor, view.pointers, view.signals, view.rank, view.world_size, ...)

Arguments that mean the same everywhere:

* ``pointer``: a pointer, or a block of pointers, into this rank's symmetric tensor;
* ``pointers``: ``st.remote_pointers``, or ``view.pointers``; int64 [world];
* ``signals``: ``view.signals``;
* ``rank``: this rank; ``world``: the number of ranks, a ``tl.constexpr``; ``peer``: another rank, or this one.

Over any backend whose peers are load/store reachable. On CPU tensors the kernels run in Triton's interpreter
(``TRITON_INTERPRET=1``, set before ``triton`` is imported); its atomics are the processor's, so ranks may be processes.

Signals. Each rank has words [channel][source], 0 at rest. A word counts what ``source`` has put and the owner has not
taken: a semaphore. So every operation leaves it as the next one needs it, and a captured CUDA graph can be replayed.
The words are the flags of :meth:`SymmetricTensor.put_signal` and ``wait_signal``: a kernel may take what the host put,
and the other way round, while at most one signal is under way on that word. symmem.cuh does the same in CUDA C++.

Time. A wait that takes longer than the view's ``timeout`` leaves word of the peer it waited for, and traps, which makes
this process's CUDA context unusable; :meth:`SymmetricTensor.synchronize` then raises PeerTimeoutError by name. In the
interpreter the kernel raises, with that error as the cause. On a GPU, a long wait on a channel below 65536 is shown by
``symmem dump`` and ``symmem top`` meanwhile; of several peers at a time, one.

Memory order is that of the PTX ISA, "Memory Consistency Model"; all scopes are sys, for peers are other devices.
"""

import os
import time

from symmem.backends import signal_kernels
from symmem.errors import InvalidArgumentError, PeerTimeoutError, UnsupportedError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UnsupportedError(
        f"symmem.triton needs Triton: {error}",
        hint="pip install triton; torch for CUDA brings it; the interpreter needs numpy as well",
    ) from error

__all__ = [
    "atomic_add",
    "atomic_cas",
    "atomic_xchg",
    "barrier",
    "load",
    "put_signal",
    "put_with_signal",
    "remote_pointer",
    "store",
    "wait_signal",
]

# The operations as `symmem.backends.signal_kernels` numbers them.
BARRIER = tl.constexpr(1)
WAIT_SIGNAL = tl.constexpr(3)
BAD_CHANNEL = tl.constexpr(4)

# Where, and how often, a wait is told; see `symmem.backends.signal_kernels.lateness`.
BEAT, TICK = tl.constexpr(signal_kernels.BEAT), tl.constexpr(signal_kernels.TICK)
PLACES, GROUP_SPREAD = tl.constexpr(signal_kernels.PLACES), tl.constexpr(signal_kernels.GROUP_SPREAD)

ACQ_REL = tl.constexpr("acq_rel")

# Words that are looked at together, one for each thread of a warp. Were there fewer, several threads of a warp would
# load the same word, and might see it change between them; were there more, warps would have to meet while they wait.
LANES = tl.constexpr(32)


# Pointers, loads, stores and atomics.


@triton.jit
def remote_pointer(pointer, pointers, rank, peer):
    """The pointer, or block of pointers, to the same elements at ``peer``.

    1. An address only; it orders nothing. Any access through it is as the caller makes it.
    """
    size: tl.constexpr = (pointer.dtype.element_ty.primitive_bitwidth + 7) // 8
    # Memory begins at the same address modulo 16 on all ranks: so the compiler still knows how elements are aligned.
    elements = (tl.load(pointers + peer) - tl.load(pointers + rank)) // size
    return pointer + tl.multiple_of(elements, 16 // size)


@triton.jit
def load(pointer, pointers, rank, peer, mask=None, other=None):
    """What ``peer`` has at ``pointer``.

    1. A weak load: it may be made only after a barrier or a wait that orders it after the store.
    """
    return tl.load(remote_pointer(pointer, pointers, rank, peer), mask=mask, other=other)


@triton.jit
def store(pointer, value, pointers, rank, peer, mask=None):
    """Store to ``peer``, at ``pointer``.

    1. A weak store: others may read it only after a barrier or a put_signal that follows it.
    """
    tl.store(remote_pointer(pointer, pointers, rank, peer), value, mask=mask)


@triton.jit
def atomic_add(pointer, value, pointers, rank, peer, mask=None, sem: tl.constexpr = ACQ_REL):
    """Add at ``peer``; returns what was there.

    1. ``sem`` is "acq_rel", "acquire", "release" or "relaxed", of the thread that does it, with scope sys; towards what
       other threads of the block have stored, put a ``tl.debug_barrier()`` between.
    2. Atomic towards all atomics of scope sys, of any GPU.
    """
    return tl.atomic_add(remote_pointer(pointer, pointers, rank, peer), value, mask=mask, sem=sem, scope="sys")


@triton.jit
def atomic_xchg(pointer, value, pointers, rank, peer, mask=None, sem: tl.constexpr = ACQ_REL):
    """Store at ``peer``; returns what was there. Order: as :func:`atomic_add`, 1. and 2."""
    return tl.atomic_xchg(remote_pointer(pointer, pointers, rank, peer), value, mask=mask, sem=sem, scope="sys")


@triton.jit
def atomic_cas(pointer, expected, value, pointers, rank, peer, sem: tl.constexpr = ACQ_REL):
    """Store at ``peer`` where ``expected`` is there; returns what was there. Order: as :func:`atomic_add`, 1. and 2."""
    return tl.atomic_cas(remote_pointer(pointer, pointers, rank, peer), expected, value, sem=sem, scope="sys")


# Meeting and signals.


@triton.jit
def barrier(signals, channel, rank, world: tl.constexpr):
    """Wait until the blocks that call it with this channel have come on all ranks: one block a rank.

    1. Release: what any thread of the block has stored before, in any rank's memory, is visible to all threads of the
       blocks that meet, after the barrier. (bar.sync, then atom.release.sys by one thread for each rank.)
    2. Acquire: no load that follows it is made before. (atom.acquire.sys, which reads what was released, then
       bar.sync.)
    3. It orders nothing between blocks of one rank, and blocks of one rank do not wait for each other. All blocks that
       meet must be running: no more of them than the GPU holds at a time.
    4. A channel is used by one block of a rank at a time; never by barriers and signals in turn.
    """
    _check_channel(signals, channel, rank, world)
    tl.debug_barrier()
    for first in tl.static_range(0, world, LANES):
        peers = first + tl.arange(0, LANES)
        theirs = tl.load(signals + peers, mask=peers < world, other=0).to(tl.pointer_type(tl.int32))
        tl.atomic_add(theirs + channel * world + rank, 1, mask=peers < world, sem="release", scope="sys")
    for first in tl.static_range(0, world, LANES):
        peers = first + tl.arange(0, LANES)
        _take(signals, channel, peers, peers < world, 1, 1, rank, world, BARRIER)


@triton.jit
def put_signal(signals, peer, channel, rank, world: tl.constexpr, count=1):
    """Add ``count`` to this rank's word at ``peer``. Waits for nobody.

    1. Release: as for :func:`barrier`, towards the block that takes it. (bar.sync, then atom.release.sys by one
       thread.)
    """
    _check_channel(signals, channel, rank, world)
    tl.debug_barrier()
    word = tl.load(signals + peer).to(tl.pointer_type(tl.int32)) + channel * world + rank
    tl.atomic_add(word, count, sem="release", scope="sys")


@triton.jit
def wait_signal(signals, source, channel, rank, world: tl.constexpr, count=1, keep: tl.constexpr = False):
    """Wait until the word of ``source`` is ``count`` or more, and take ``count`` from it.

    With ``keep``, leave it as it is: then counts only grow, and the caller says which one it waits for (an epoch, below
    2**31).

    1. Acquire: what the blocks that put those ``count`` have stored before is visible to all threads of this block
       afterwards. (atom.acquire.sys by one thread, which reads what was released; then bar.sync.)
    2. One block takes from a word at a time.
    """
    _check_channel(signals, channel, rank, world)
    lanes = tl.arange(0, LANES)
    _take(signals, channel, source + lanes, lanes == 0, count, 0 if keep else count, rank, world, WAIT_SIGNAL)


@triton.jit
def put_with_signal(pointer, value, pointers, signals, peer, channel, rank, world: tl.constexpr, mask=None, count=1):
    """Store ``value`` at ``peer``, then put a signal.

    1. As :func:`store`, then :func:`put_signal`: who has taken the signal sees the value, and all that this block has
       stored before.
    """
    store(pointer, value, pointers, rank, peer, mask)
    put_signal(signals, peer, channel, rank, world, count)


@triton.jit
def _take(signals, channel, sources, mask, count, taken, rank, world: tl.constexpr, operation: tl.constexpr):
    """Wait until this rank's words of all ``sources`` [LANES] are ``count`` or more; take ``taken`` from each."""
    words = tl.load(signals + rank).to(tl.pointer_type(tl.int32)) + channel * world + sources
    missing = _missing(words, sources, mask, count)
    if missing >= 0:
        limit = tl.load(signals + world)
        begin = _now()
        beats = _beats(begin - begin)
        while missing >= 0:
            waited = _now() - begin
            if waited > limit:
                _fail(signals, operation, channel, missing, rank, world)
            if _beats(waited) != beats:
                beats = _beats(waited)
                _tell(signals, operation, channel, missing, waited, limit, world)
            missing = _missing(words, sources, mask, count)
    tl.debug_barrier()  # each warp has looked for itself: nothing is taken before all have seen it
    tl.atomic_add(words, -taken, mask=mask, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _missing(words, sources, mask, count):
    """The last of the sources whose word is below ``count``, or -1; the same for all threads of a warp.

    A volatile load is relaxed at scope sys (PTX ISA, "ld"); the acquire is in the read-modify-write that takes.
    """
    seen = tl.load(words, mask=mask, other=count, volatile=True)
    return tl.max(tl.where(seen < count, sources, -1), 0)


@triton.jit
def _check_channel(signals, channel, rank, world: tl.constexpr):
    channels = tl.load(signals + world + 3).to(tl.int32)
    if channel >= channels:
        _fail(signals, BAD_CHANNEL, channel, channels, rank, world)


if triton.knobs.runtime.interpret:

    def _now():
        """Nanoseconds."""
        os.sched_yield()  # the awaited rank may have to run on this very processor
        return time.monotonic_ns()

    def _beats(waited):
        """Nobody looks for waits in the interpreter."""
        return 0

    def _number(value):
        """What a kernel has as a number: of Python, a constant, or a tensor of the interpreter."""
        return int(value.handle.data.item() if isinstance(value, tl.tensor) else getattr(value, "value", value))

    def _fail(signals, operation, channel, peer, rank, world):
        """Say what was wrong, and stop."""
        channel, peer, rank = (_number(value) for value in (channel, peer, rank))
        if operation.value == BAD_CHANNEL.value:
            raise InvalidArgumentError(
                f"a kernel used signal channel {channel}, but its device view has {peer} channels",
                hint="give device_view() signals with more channels",
                rank=rank,
                step="signal in a kernel",
            )
        raise PeerTimeoutError(
            f"rank {peer} did not come in time",
            hint=f"see what rank {peer} does; if it is only slow, give device_view() a longer timeout",
            rank=rank,
            step=f"{'barrier' if operation.value == BARRIER.value else 'wait_signal'} on channel {channel}",
            peers=(peer,),
        )

else:

    @triton.jit
    def _now():
        """Nanoseconds."""
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def _beats(waited):
        """How often a wait has been told after so many nanoseconds."""
        return waited >> BEAT

    @triton.jit
    def _tell(signals, operation: tl.constexpr, channel, peer, waited, limit, world: tl.constexpr):
        """Say that a block waits where the host looks."""
        if channel < 65536:
            group = tl.load(signals + world + 2).to(tl.int32)
            place = tl.load(signals + world + 1) + 16 * (1 + (group * GROUP_SPREAD + peer) % PLACES)
            who, whom = operation << 24 | group, channel << 16 | peer
            _leave_word(place, who, whom, (waited >> TICK).to(tl.int32), ((limit - waited) >> TICK).to(tl.int32))

    @triton.jit
    def _leave_word(at, a, b, c, d):
        """One store of 16 bytes, so that what two threads write at a time does not mix."""
        tl.inline_asm_elementwise(
            """{
            st.volatile.global.v4.u32 [$1], {$2, $3, $4, $5};
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r,r,r",
            [at, a, b, c, d],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def _fail(signals, operation: tl.constexpr, channel, peer, rank, world: tl.constexpr):
        """Say what was wrong where SymmetricTensor.synchronize() looks, and stop."""
        group = tl.load(signals + world + 2).to(tl.int32)
        _leave_word(tl.load(signals + world + 1), operation, channel, peer, group)
        tl.inline_asm_elementwise(
            "{ fence.acq_rel.sys; trap; mov.u32 $0, 0; }", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )

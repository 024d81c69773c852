"""Symmetric memory inside Triton kernels: functions to call from a ``@triton.jit`` function.

    from symmem import triton as symm

    @triton.jit
    def kernel(x, pointers, signals, rank, world: tl.constexpr, ...):
        tl.store(x + offsets, ...)                                      # this rank's part
        symm.barrier(signals, tl.program_id(0), rank, world)            # block b waits for block b of all other ranks
        theirs = symm.load(x + offsets, pointers, rank, peer, mask)     # the same elements of a peer

    view = st.device_view()
    kernel[grid](st.tensor, view.pointers, view.signals, view.rank, view.world_size, ...)

Arguments that all functions share:

* ``pointer``: a pointer, or a block of pointers, into this rank's symmetric tensor;
* ``pointers``: ``st.remote_pointers``, or ``view.pointers``; int64 [world];
* ``signals``: ``view.signals``;
* ``rank``: this rank; ``world``: the number of ranks, a ``tl.constexpr``; ``peer``: another rank, or this one.

These functions need a backend with load/store reachable peers. On CPU tensors the kernels run in Triton's interpreter
(set ``TRITON_INTERPRET=1`` before ``triton`` is imported). The interpreter uses the processor's atomics, so ranks may
be processes.

Signals. Every rank has words [channel][source]; they are 0 at rest. A word is a semaphore: it counts the signals that
``source`` has put and the owner has not taken. Every operation leaves the word ready for the next operation, so a
captured CUDA graph can be replayed. The words are also the flags of :meth:`SymmetricTensor.put_signal` and
``wait_signal``. A kernel may take the host's signal, and the host a kernel's, while at most one signal is pending on
the word. symmem.cuh implements the same protocol in CUDA C++.

Time. A wait that takes longer than the view's ``timeout`` records the peer and traps. So does a wait of 0.1 s or more
once a process of the group has ended. The trap makes this process's CUDA context unusable;
:meth:`SymmetricTensor.synchronize` then raises a PeerTimeoutError or PeerLostError that names the peer. In the
interpreter the kernel raises, with that error as the cause. On a GPU, ``symmem dump`` and ``symmem top`` show long
waits on channels below 65536; if a block waits for several peers, they show one.

Memory order follows the PTX ISA, "Memory Consistency Model". All scopes are sys, because peers are other devices.
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

# The numbers of operations; the same as in `symmem.backends.signal_kernels`.
BARRIER = tl.constexpr(1)
WAIT_SIGNAL = tl.constexpr(3)
BAD_CHANNEL = tl.constexpr(4)

# Where and how often a wait is reported; see `symmem.backends.signal_kernels.lateness`.
BEAT, TICK = tl.constexpr(signal_kernels.BEAT), tl.constexpr(signal_kernels.TICK)
PLACES, GROUP_SPREAD = tl.constexpr(signal_kernels.PLACES), tl.constexpr(signal_kernels.GROUP_SPREAD)

ACQ_REL = tl.constexpr("acq_rel")

# Words that are read together, one per thread of a warp. With fewer words, several threads of a warp would load the
# same word and might see different values. With more words, warps would have to synchronize while they wait.
LANES = tl.constexpr(32)


# Pointers, loads, stores and atomics.


@triton.jit
def remote_pointer(pointer, pointers, rank, peer):
    """Return the pointer, or block of pointers, to the same elements of ``peer``.

    1. This computes an address and orders nothing. The caller chooses how to access it.
    """
    size: tl.constexpr = (pointer.dtype.element_ty.primitive_bitwidth + 7) // 8
    # Memory begins at the same address modulo 16 on all ranks, so the compiler still knows the alignment of elements.
    elements = (tl.load(pointers + peer) - tl.load(pointers + rank)) // size
    return pointer + tl.multiple_of(elements, 16 // size)


@triton.jit
def load(pointer, pointers, rank, peer, mask=None, other=None):
    """Load the elements of ``peer`` at ``pointer``.

    1. A weak load: make it after a barrier or a wait that orders it after the store.
    """
    return tl.load(remote_pointer(pointer, pointers, rank, peer), mask=mask, other=other)


@triton.jit
def store(pointer, value, pointers, rank, peer, mask=None):
    """Store to the elements of ``peer`` at ``pointer``.

    1. A weak store: other ranks may read it only after a later barrier or put_signal.
    """
    tl.store(remote_pointer(pointer, pointers, rank, peer), value, mask=mask)


@triton.jit
def atomic_add(pointer, value, pointers, rank, peer, mask=None, sem: tl.constexpr = ACQ_REL):
    """Add to the elements of ``peer``; returns the previous values.

    1. ``sem`` is "acq_rel", "acquire", "release" or "relaxed", with scope sys, for the thread that executes the atomic.
       To order stores of other threads of the block, put a ``tl.debug_barrier()`` between.
    2. Atomic with respect to all atomics of scope sys, of any GPU.
    """
    return tl.atomic_add(remote_pointer(pointer, pointers, rank, peer), value, mask=mask, sem=sem, scope="sys")


@triton.jit
def atomic_xchg(pointer, value, pointers, rank, peer, mask=None, sem: tl.constexpr = ACQ_REL):
    """Store to ``peer``; returns the previous values. Order: as :func:`atomic_add`, 1. and 2."""
    return tl.atomic_xchg(remote_pointer(pointer, pointers, rank, peer), value, mask=mask, sem=sem, scope="sys")


@triton.jit
def atomic_cas(pointer, expected, value, pointers, rank, peer, sem: tl.constexpr = ACQ_REL):
    """Store to ``peer`` if it has ``expected``; returns the previous values. Order: as :func:`atomic_add`, 1. and 2."""
    return tl.atomic_cas(remote_pointer(pointer, pointers, rank, peer), expected, value, sem=sem, scope="sys")


# Barrier and signals.


@triton.jit
def barrier(signals, channel, rank, world: tl.constexpr):
    """Wait until one block of every rank has called it with this channel.

    1. Release: all earlier stores of any thread of the block, to any rank's memory, are visible after the barrier to
       all threads of the participating blocks. (bar.sync, then atom.release.sys by one thread per rank.)
    2. Acquire: no later load is made before the barrier. (atom.acquire.sys, which reads the released value, then
       bar.sync.)
    3. It orders nothing between blocks of one rank, and blocks of one rank do not wait for each other. All
       participating blocks must run at the same time, so there may be no more of them than the GPU can hold.
    4. One block of a rank may use a channel at a time. A channel must not alternate between barriers and signals.
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
    """Add ``count`` to this rank's word at ``peer``. Does not wait.

    1. Release: earlier stores of the block are visible to the block that takes the signal, as for :func:`barrier`.
       (bar.sync, then atom.release.sys by one thread.)
    """
    _check_channel(signals, channel, rank, world)
    tl.debug_barrier()
    word = tl.load(signals + peer).to(tl.pointer_type(tl.int32)) + channel * world + rank
    tl.atomic_add(word, count, sem="release", scope="sys")


@triton.jit
def wait_signal(signals, source, channel, rank, world: tl.constexpr, count=1, keep: tl.constexpr = False):
    """Wait until the word of ``source`` is ``count`` or more, and subtract ``count`` from it.

    With ``keep``, the word does not change. Counts then only grow, and the caller waits for an epoch below 2**31.

    1. Acquire: stores that the signalling blocks made before they put these ``count`` signals are visible to all
       threads of this block afterwards. (atom.acquire.sys by one thread, which reads the released value, then
       bar.sync.)
    2. Only one block may take from a word at a time.
    """
    _check_channel(signals, channel, rank, world)
    lanes = tl.arange(0, LANES)
    _take(signals, channel, source + lanes, lanes == 0, count, 0 if keep else count, rank, world, WAIT_SIGNAL)


@triton.jit
def put_with_signal(pointer, value, pointers, signals, peer, channel, rank, world: tl.constexpr, mask=None, count=1):
    """Store ``value`` at ``peer``, then put a signal.

    1. As :func:`store`, then :func:`put_signal`: a block that has taken the signal sees the value and all earlier
       stores of this block.
    """
    store(pointer, value, pointers, rank, peer, mask)
    put_signal(signals, peer, channel, rank, world, count)


@triton.jit
def _take(signals, channel, sources, mask, count, taken, rank, world: tl.constexpr, operation: tl.constexpr):
    """Wait until this rank's words of all ``sources`` [LANES] are ``count`` or more; subtract ``taken`` from them."""
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
                _report_wait(signals, operation, channel, missing, waited, limit, world)
            missing = _missing(words, sources, mask, count)
    tl.debug_barrier()  # every warp reads the words itself, so subtract only after all warps have seen the values
    tl.atomic_add(words, -taken, mask=mask, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _missing(words, sources, mask, count):
    """Return the last source with a word below ``count``, or -1; the same for all threads of a warp.

    A volatile load is relaxed at scope sys (PTX ISA, "ld"); the later read-modify-write is the acquire.
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
        """Return a time in nanoseconds."""
        os.sched_yield()  # the awaited rank may need this processor
        return time.monotonic_ns()

    def _beats(waited):
        """Waits in the interpreter are not reported."""
        return 0

    def _number(value):
        """Convert a kernel's number: a Python number, a constant, or a tensor of the interpreter."""
        return int(value.handle.data.item() if isinstance(value, tl.tensor) else getattr(value, "value", value))

    def _fail(signals, operation, channel, peer, rank, world):
        """Raise the error."""
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
            hint=f"check what rank {peer} is doing; if it is only slow, give device_view() a longer timeout",
            rank=rank,
            step=f"{'barrier' if operation.value == BARRIER.value else 'wait_signal'} on channel {channel}",
            peers=(peer,),
        )

else:

    @triton.jit
    def _now():
        """Return a time in nanoseconds."""
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def _beats(waited):
        """Return how often a wait must have been reported after ``waited`` nanoseconds."""
        return waited >> BEAT

    @triton.jit
    def _report_wait(signals, operation: tl.constexpr, channel, peer, waited, limit, world: tl.constexpr):
        """Report to the host that a block waits."""
        if channel < 65536:
            group = tl.load(signals + world + 2).to(tl.int32)
            place = tl.load(signals + world + 1) + 16 * (1 + (group * GROUP_SPREAD + peer) % PLACES)
            waiting, awaited = operation << 24 | group, channel << 16 | peer
            _leave_word(place, waiting, awaited, (waited >> TICK).to(tl.int32), ((limit - waited) >> TICK).to(tl.int32))
        _fail_if_lost(signals, operation, channel, peer, world)

    @triton.jit
    def _fail_if_lost(signals, operation: tl.constexpr, channel, peer, world: tl.constexpr):
        """Fail if the host has noted that a process of the group ended."""
        group = tl.load(signals + world + 2)
        record = tl.load(signals + world + 1) + 16 * (1 + PLACES) + 32 * group
        if tl.load(record.to(tl.pointer_type(tl.int32)), volatile=True) != 0:
            _fail(signals, operation, channel, peer, 0, world)

    @triton.jit
    def _leave_word(at, a, b, c, d):
        """Store 16 bytes at once, so that the records of two threads do not mix."""
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
        """Record the error for SymmetricTensor.synchronize(), and trap."""
        group = tl.load(signals + world + 2).to(tl.int32)
        _leave_word(tl.load(signals + world + 1), operation, channel, peer, group)
        tl.inline_asm_elementwise(
            "{ fence.acq_rel.sys; trap; mov.u32 $0, 0; }", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )

"""Properties of the backend ``native`` that need GPUs: streams, graphs, running kernels, and speed beside PyTorch.

The conformance suite covers the rest. There is one rank per GPU, or two ranks on a single GPU.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
from symmem.errors import OutOfMemoryError, PeerTimeoutError
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool

GPUS = torch.cuda.device_count()
WORLD = max(GPUS, 2)

FOUND = examine("native")

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


def shared(*sizes: int, **options: Any) -> symmem.SymmetricTensor:
    return symmem.allocate(sizes, torch.int64, backend="native", arena=False, **options).rendezvous()


def ring() -> tuple[int, int, int]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return rank, (rank + 1) % world, (rank - 1) % world


def meet() -> None:
    torch.cuda.synchronize()
    with symmem.resolve_group().collective("meet"):
        pass


def peers_memory() -> None:
    rank, following, previous = ring()
    st = shared(1000)
    remote = st.remote_tensor(following)
    assert remote.device == st.tensor.device == torch.device("cuda", torch.cuda.current_device())
    assert remote.data_ptr() == st.remote_pointers[following].item()  # not a copy
    remote.fill_(rank + 1)
    st.barrier()
    assert (st.tensor == previous + 1).all()
    view = st.contiguous_view()
    assert view[rank].data_ptr() != st.tensor.data_ptr()  # a second mapping of the same memory
    assert view[:, 0].tolist() == [(peer - 1) % view.shape[0] + 1 for peer in range(view.shape[0])]
    meet()


def test_peers_memory_is_reached_not_copied(pools: Any) -> None:
    pools.get(WORLD, "native").run(peers_memory)


def graph_of_barriers() -> None:
    rank, following, _previous = ring()
    st, out, turn = shared(4096), torch.zeros(4096, dtype=torch.int64, device="cuda"), 0
    value = torch.zeros(1, dtype=torch.int64, device="cuda")
    st.barrier()  # compiles; this works inside the capture too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value += 1
        st.tensor.copy_(value * 1000 + rank)
        st.barrier()
        out.copy_(st.remote_tensor(following))
        st.put_signal(following, channel=3)
        st.wait_signal((rank - 1) % dist.get_world_size(), channel=3)
        st.barrier(channel=1)
    for turn in range(1, 101):
        graph.replay()
        if turn % 10 == 0:
            assert out.unique().tolist() == [turn * 1000 + following]
    st.synchronize()
    assert not st.signal_pad(rank).view(torch.int32).any()
    meet()


def test_a_graph_of_signals_can_be_replayed(pools: Any) -> None:
    pools.get(WORLD, "native").run(graph_of_barriers)


def first_use_in_a_capture() -> None:
    st, counter = shared(16), torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        st.barrier()
        counter += 1
    graph.replay()
    st.synchronize()
    assert counter.item() == 1
    meet()


def test_signals_can_be_used_first_in_a_capture(new_pool: Callable[..., RankPool]) -> None:
    new_pool(WORLD).run(first_use_in_a_capture)


def allocated_in_a_capture() -> None:
    outside, counter = shared(32 << 20), torch.zeros(1, device="cuda")
    meet()
    free = torch.cuda.mem_get_info()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = symmem.allocate(1 << 20, backend="native", arena=False)
        counter += 1
        del outside
        gc.collect()
        inside.tensor.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert counter.item() == 1
    assert inside.tensor.unique().tolist() == [1]
    inside = None  # type: ignore[assignment]
    symmem.allocate(1, backend="native", arena=False)
    meet()
    assert torch.cuda.mem_get_info()[0] >= free + (128 << 20)  # for 256 MiB


def test_allocating_and_freeing_amid_a_capture(new_pool: Callable[..., RankPool]) -> None:
    new_pool(WORLD).run(allocated_in_a_capture)


def freed_in_flight() -> None:
    _rank, following, _previous = ring()
    out = torch.zeros(8 << 20, dtype=torch.int64, device="cuda")
    side: Any = torch.cuda.Stream()
    for _ in range(10):
        st = shared(8 << 20)
        with torch.cuda.stream(side):
            for _ in range(20):
                out += st.remote_tensor(following)
                st.tensor.add_(0)
        del st
        gc.collect()
    torch.cuda.synchronize()
    assert not out.any()
    meet()


def test_memory_may_be_freed_while_kernels_use_it(pools: Any) -> None:
    pools.get(WORLD, "native").run(freed_in_flight)


def from_a_new_thread() -> None:
    st, failures = shared(16), []

    def work() -> None:
        try:
            for _ in range(3):
                st.barrier(channel=5)
            st.synchronize()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert failures == []
    meet()


def test_a_thread_may_begin_with_a_barrier(pools: Any) -> None:
    pools.get(WORLD, "native").run(from_a_new_thread)


def late_in_a_graph() -> None:
    rank = dist.get_rank()
    st, after = shared(16), torch.zeros(1, device="cuda")
    after_it = torch.empty_like(st.tensor)
    st.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        st.barrier(channel=7, timeout=0.5)
        after += 1
    if rank == 0:
        graph.replay()
        begin = time.monotonic()
        with pytest.raises(PeerTimeoutError, match="barrier on channel 7") as caught:
            st.synchronize()
        assert 0.3 < time.monotonic() - begin < 10
        assert caught.value.rank == 0
        uses: list[Callable[[], object]] = [st.barrier, st.synchronize, lambda: st.put_signal(1)]
        uses += [lambda: st.put(st.tensor, 1), lambda: st.get(1, after_it), lambda: st.remote_pointers]
        for use in uses * 3:
            with pytest.raises(PeerTimeoutError, match="barrier on channel 7"):
                use()
    with symmem.resolve_group().collective("done", timeout=30):
        pass


def test_a_graph_whose_peer_does_not_come_stops_by_name(new_pool: Callable[..., RankPool]) -> None:
    new_pool(WORLD).run(late_in_a_graph)


def out_of_memory() -> str:
    free = torch.cuda.mem_get_info()[0]
    with pytest.raises(OutOfMemoryError) as caught:
        symmem.allocate(free + (1 << 30), torch.uint8, backend="native", arena=False)
    text = str(caught.value)
    del caught
    gc.collect()
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20)
    return text


def test_too_much_memory_is_refused_by_name(pools: Any) -> None:
    assert "empty_cache" in pools.get(WORLD, "native").run(out_of_memory)[0]

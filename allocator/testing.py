"""Test code that runs on several ranks, under pytest or any other runner.

    from symmem.testing import ranks

    @ranks(4)
    def test_halo(rank, world):
        st = symmem.allocate(8, device="cpu").rendezvous()
        ...

The test runs in 4 processes with a default process group: gloo on the CPU, and NCCL beside it where there are GPUs. It
passes if all ranks pass. If an assertion fails, its values and the rank are shown. The processes stay alive for the
next test with the same number of ranks. No GPU is needed.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from symmem.errors import InvalidArgumentError
from symmem.tools.outcomes import RanksFailedError
from symmem.tools.ranks import RankPool, resolve_function

__all__ = ["RanksFailedError", "ranks"]

F = TypeVar("F", bound=Callable[..., None])

_pools: dict[tuple[int, tuple[tuple[str, str | None], ...]], RankPool] = {}


def ranks(size: int, *, timeout: float = 60.0, env: Mapping[str, str | None] | None = None) -> Callable[[F], F]:
    """Decorate a test so that it runs on ``size`` ranks.

    The test may take the arguments ``rank`` and ``world``. Its other arguments come from the runner, for example from
    ``pytest.mark.parametrize`` or from fixtures, and travel to the ranks by pickle. The test must be at module level.

    Args:
        size: Number of ranks, each a process.
        timeout: Seconds for the test. Afterwards the ranks print their stacks and are killed, and the test fails.
        env: Environment variables of the ranks, over those of this process; None removes a variable.

    Raises:
        InvalidArgumentError: ``size`` is not a positive integer, the test is not at module level, or an argument cannot
            be pickled.
        RanksFailedError: By the test: some rank raised, died, or did not end in time.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidArgumentError(f"ranks() needs a positive number of ranks, not {size!r}")

    def decorate(test: F) -> F:
        if "." in test.__qualname__:
            raise InvalidArgumentError(
                f"{test.__qualname__} is not at module level, so other processes cannot find it",
                hint="move the test out of its class or function",
            )
        signature = inspect.signature(test)
        own = [name for name in ("rank", "world") if name in signature.parameters]

        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            try:
                pickled = pickle.dumps(arguments)
            except Exception as error:
                raise InvalidArgumentError(
                    f"an argument of {test.__name__} cannot travel to the ranks: {error}",
                    hint="pass plain values, and make everything else in the test",
                ) from error
            reference = test.__module__, inspect.getfile(test), test.__qualname__
            _pool(size, env).run(_run_test, reference, own, pickled, timeout=timeout)

        # The runner must not look for fixtures of these names.
        parameters = [each for name, each in signature.parameters.items() if name not in own]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


def _run_test(reference: tuple[str, str, str], own: list[str], pickled: bytes) -> None:
    """Within a rank: the test itself."""
    test = inspect.unwrap(resolve_function(*reference))
    known = {"rank": dist.get_rank(), "world": dist.get_world_size()}
    test(**pickle.loads(pickled), **{name: known[name] for name in own})


def _pool(size: int, env: Mapping[str, str | None] | None) -> RankPool:
    """The pool of ranks with this size and environment; a new one if a rank of the last one died."""
    key = size, tuple(sorted((env or {}).items()))
    pool = _pools.get(key)
    if pool is None or not pool.alive:
        if pool is not None:
            pool.close()
        pool = _pools[key] = RankPool(size, env=env)
    return pool


@atexit.register
def _close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()

"""The conformance suite: functions that check a backend, and that every rank of a group runs.

Programs and tests run a case with :func:`run_case` on the ranks of a pool::

    from symmem.tools.conformance import CASES, run_case
    from symmem.tools.ranks import RankPool

    with RankPool(4) as pool:
        for case in CASES.values():
            pool.run(run_case, case.name, "host")

A third-party backend that has an entry point in ``symmem.backends`` is tested by its name. If a case needs a
capability that the backend does not list, the backend must refuse it with a named error. Every case counts descriptors
and mappings before and after, so a leak fails the case that made it.
"""

from symmem.tools.conformance import arenas, groups, memory, peers, signals
from symmem.tools.conformance.case import CASES, Case, Context, run_case

__all__ = ["CASES", "Case", "Context", "arenas", "groups", "memory", "peers", "run_case", "signals"]

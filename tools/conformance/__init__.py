"""The conformance suite: what every backend must do, as functions that each rank of a group runs.

Programs and tests run it with :func:`run_case` on the ranks of a pool::

    from symmem.tools.conformance import CASES, run_case
    from symmem.tools.ranks import RankPool

    with RankPool(4) as pool:
        for case in CASES.values():
            pool.run(run_case, case.name, "host")

A backend of a third party, once it has its entry point in ``symmem.backends``, joins by its name. Where a
case needs a capability that the backend does not list, it must refuse by a named error instead. Each case counts
descriptors and mappings before and after, so a leak fails the case that made it.
"""

from symmem.tools.conformance import arenas, groups, memory, peers, signals
from symmem.tools.conformance.case import CASES, Case, Context, run_case

__all__ = ["CASES", "Case", "Context", "arenas", "groups", "memory", "peers", "run_case", "signals"]

"""What all ranks of a group must have alike: compared before they go on, so that a difference is an error on all."""

from __future__ import annotations

import json
from collections.abc import Mapping

from symmem.errors import MismatchError
from symmem.group.group import Group, differing

__all__ = ["compare"]


def compare(group: Group, step: str, card: Mapping[str, object], hint: str) -> None:
    """Let all ranks compare what they have. Collective over the group, and waits.

    Args:
        group: Of the ranks.
        step: The operation that they are about to do, the same on all ranks.
        card: What must be alike, by names for errors.
        hint: What to do if something is not.

    Raises:
        MismatchError: On all ranks: names what differs, and who has what.
        SymmemError: On all ranks: what a rank has told instead by :meth:`Group.fail`; or who died or did not come.
    """
    if group.size == 1:
        return
    with group.collective("comparison", group.settings.signal_timeout) as collective:
        sent = {"operation": step, **{name: str(value) for name, value in card.items()}}
        with collective.exchange("what is alike", json.dumps(sent).encode()) as received:
            cards = [json.loads(contribution.payload) for contribution in received]
        for name in sent:
            values = [each.get(name, "none") for each in cards]
            if len(set(values)) > 1:
                text, peers = differing(values)
                raise MismatchError(f"ranks differ in {name}: {text}", hint=hint, step=step, peers=peers)

"""Functions of torch in whose place ours stand while a device is initialized."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wrapping:
    """That ``ours`` stands in the place of ``owner.name``, which is ``before`` at other times."""

    owner: Any
    name: str
    before: Callable[..., Any]
    ours: Callable[..., Any]


def put_on(wrappings: Iterable[Wrapping]) -> None:
    """Let ours be called from now on."""
    for one in wrappings:
        setattr(one.owner, one.name, one.ours)


def take_off(wrappings: Iterable[Wrapping]) -> None:
    """Put back what was there, unless somebody else has wrapped it meanwhile."""
    for one in wrappings:
        if getattr(one.owner, one.name) is one.ours:
            setattr(one.owner, one.name, one.before)

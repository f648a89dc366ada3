"""Functions of torch in whose place ours stand while a device is initialized."""

from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


class Wrapping:
    """That ``wrap(before)`` stands in the place of ``owner.name``, which is ``before`` else."""

    def __init__(self, owner: Any, name: str, wrap: Callable[[Function], Function]) -> None:
        self._owner = owner
        self._name = name
        self._wrap = wrap
        self._before: Function | None = None
        self._ours: Function | None = None

    def put_on(self) -> None:
        """Let ours be called from now on; it calls what is there now."""
        self._before = getattr(self._owner, self._name)
        self._ours = self._wrap(self._before)
        setattr(self._owner, self._name, self._ours)

    def take_off(self) -> None:
        """Put back what was there, unless somebody else has wrapped it meanwhile."""
        if self._ours is not None and getattr(self._owner, self._name) is self._ours:
            setattr(self._owner, self._name, self._before)
        self._ours = None

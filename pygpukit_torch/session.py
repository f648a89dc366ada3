"""Sessions: the part of a program that works in a context."""

from types import TracebackType
from typing import TYPE_CHECKING

from pygpukit_torch import native

if TYPE_CHECKING:
    from pygpukit_torch.context import ExecutionContext


class ContextSession:
    """What :func:`pygpukit_torch.context_session` returns.

    Re-entrant, and usable by several threads at once.

    Attributes:
        context: the context that the session works in.
    """

    __slots__ = ("_native", "context")

    def __init__(self, context: "ExecutionContext", *, wait: bool = True) -> None:
        self.context = context
        self._native = native.Session(context._native, wait)

    def __enter__(self) -> "ContextSession":
        self._native.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._native.exit()

    def __repr__(self) -> str:
        return f"<ContextSession of {self.context.name!r}>"

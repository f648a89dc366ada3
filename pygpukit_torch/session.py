"""Sessions: the part of a program that works in a context."""

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

from pygpukit_torch import event_loop, native
from pygpukit_torch.decorators import decorated
from pygpukit_torch.errors import SessionError
from pygpukit_torch.streams import ContextEvent, ContextStream, completion_of

P = ParamSpec("P")
R = TypeVar("R")

_making = threading.Lock()  # of a session's list of entries, by whichever task comes first


@dataclass(eq=False)
class _Entry:
    """A session entered by a task of an event loop, or by a callback of one."""

    native: native.TaskEntry
    membership: event_loop.Membership
    step: int  # the number of the step; 0 if the loop did not know yet that there are sessions
    frame: int  # what called __aenter__ and will call __aexit__; 0 if it need not be the same
    is_on_thread: bool = False  # the session, entered by `with` in a step of number 0
    guard: asyncio.Handle | None = None
    has_moved: bool = False  # its step, to the context
    stream: int = 0  # the thread's before that


class ContextSession(native.BoundSession):
    """What :func:`pygpukit_torch.context_session` returns.

    For ``with`` and ``async with``; also a decorator. Re-entrant, and usable by several threads and
    tasks at once.

    Attributes:
        context: the context that the session works in.
    """

    # Making, entering and leaving one is native, since it is done often. In a running event loop
    # the native __enter__ and __exit__ call the _in_task methods.

    __slots__ = ("_entries",)
    _entries: list[_Entry]  # made when the first is

    # Tasks ---------------------------------------------------------------------------------------

    def _begin_in_task(self, ticket: native.SessionTicket | None, frame: int = 0) -> _Entry:
        loop = event_loop.running_loop()
        task = asyncio.current_task()
        entries = native.sessions.get(())
        outer = event_loop.innermost(entries)
        if outer is not None:
            self._require_own_variables(outer, task, loop)
        entry = _Entry(
            native.TaskEntry(self.context._native, task, ticket),
            event_loop.Membership(loop),
            native.step_number(),
            frame,
        )
        native.sessions.set((*(entry for entry in entries if entry.is_open), entry.native))
        with _making:
            if not hasattr(self, "_entries"):
                self._entries = []
        self._entries.append(entry)
        return entry

    def _open_entries(self) -> list[_Entry]:
        return list(getattr(self, "_entries", ()))  # others may take theirs off meanwhile

    def _require_own_variables(
        self,
        outer: native.TaskEntry,
        task: asyncio.Task[Any] | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # Two tasks whose steps alternate cannot have one stack of sessions. One that has ended can
        # leave it to the next: that is how asyncio.Runner and test fixtures work.
        if task is None or outer.is_by(task) or not outer.is_of_these_variables:
            return
        if any(outer.is_by(other) for other in asyncio.all_tasks(loop)):
            raise SessionError(
                f"context {self.context.name!r} cannot be entered: another task, which shares this "
                f"one's contextvars, is in context {outer.context.name!r}; make tasks with "
                "create_task(), each with contextvars of its own"
            )

    def _end_in_task(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        if entry.guard is not None:
            entry.guard.cancel()
        entry.native.close()
        entries = native.sessions.get(())
        if entry.native in entries:
            native.sessions.set(tuple(other for other in entries if other is not entry.native))
            step = native.step_number()
            if step and (entry.has_moved or not entry.step):
                native.follow_task()
            if step == entry.step and entry.has_moved:
                # The task may have chosen a stream before it entered.
                self.restore_stream(entry.stream)
        entry.membership.end()

    def _move_step(self, entry: _Entry) -> None:
        self.begin()
        entry.stream = native.follow_task()
        entry.has_moved = True

    def _entry_here(self) -> _Entry | None:
        """Return the innermost among the sessions of the task that runs."""
        ours = {id(entry.native): entry for entry in self._open_entries()}
        for one in reversed(native.sessions.get(())):
            if id(one) in ours:
                return ours[id(one)]
        return None

    def _enter_in_task(self) -> "ContextSession":
        """``with`` in an event loop: native.Session.__enter__ calls it."""
        ticket = native.queue_up(self.context._native)
        try:
            if ticket is not None and ticket.is_waiting:
                ticket.give_up(0.0 if self._timeout == 0 else None)
            entry = self._begin_in_task(ticket)
        except BaseException:
            if ticket is not None:
                ticket.end()
            raise
        try:
            if entry.step:
                self._move_step(entry)
            else:
                self.enter()
                entry.is_on_thread = True
                # The step that runs cannot be told when it ends. The next thing that runs after it
                # sees to it that no other task is in this one's context for longer.
                loop = asyncio.get_running_loop()
                entry.guard = loop.call_soon(self._drop, entry, context=contextvars.Context())
        except BaseException:
            self._end_in_task(entry)
            raise
        return self

    def _drop(self, entry: _Entry) -> None:
        entry.is_on_thread = False
        self.leave()

    def _exit_in_task(self, kind: type[BaseException] | None) -> None:
        entry = self._entry_here()
        if entry is None:
            self.exit()
            return
        try:
            if entry.is_on_thread:
                self.exit()
            elif entry.native.is_open:  # not in a forked child
                self.finish()
        finally:
            self._end_in_task(entry)
        crossed = entry.step != native.step_number()
        # Not instead of what must get through: a cancellation, say.
        if crossed and (kind is None or issubclass(kind, Exception)):
            raise SessionError(
                f"the session of context {self.context.name!r} was entered by 'with' and held "
                "across an 'await': use 'async with'"
            )

    # Not coroutines: the frame that calls them tells which entry is which, where tasks share a
    # session object and one of them is closed in the middle of a step of another.

    def __aenter__(self) -> Coroutine[Any, Any, "ContextSession"]:
        return self._enter_for(_lasting(sys._getframe(1)))

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Coroutine[Any, Any, None]:
        return self._exit_for(_lasting(sys._getframe(1)), kind)

    async def _let_in(self, ticket: native.SessionTicket | None) -> native.Hold | native.Job:
        """Suspend the task until it is its turn, and then until the context is there.

        Returns:
            What keeps the context active until the entry does.
        """
        if ticket is not None:
            await event_loop.turn(ticket, self._timeout)
        if (hold := native.Hold.take_if_ready(self.context._native)) is not None:
            return hold
        job = native.Job.begin_session(self.context._native)  # it moves or is evicted
        await event_loop.finish(job)
        return job

    async def _enter_for(self, frame: int) -> "ContextSession":
        handle = self.context._native
        ticket = native.queue_up(handle)
        try:
            # Until the entry does so itself: else somebody could evict it in between.
            _kept: native.Hold | native.Job | None = None
            if ticket is None:
                _kept = native.Hold.take_if_ready(handle)
            if _kept is None:
                _kept = await self._let_in(ticket)
            entry = self._begin_in_task(ticket, frame)
        except BaseException:
            if ticket is not None:
                ticket.end()
            raise
        finally:
            _kept = None  # not until somebody drops the traceback
        try:
            if entry.step:
                self._move_step(entry)
                return self
            self.begin()
            # This step began before the loop knew of the session; the next one is in it.
            await asyncio.sleep(0)
            if not native.step_number():
                loop = asyncio.get_running_loop()
                raise SessionError(
                    f"sessions cannot follow the tasks of {type(loop).__name__}: it does not run "
                    "their steps by call_soon()"
                )
        except BaseException:
            self._end_in_task(entry)
            raise
        return self

    async def _exit_for(self, frame: int, kind: type[BaseException] | None) -> None:
        own = [entry for entry in self._open_entries() if frame and entry.frame == frame]
        entry = own[-1] if own else self._entry_here()
        if entry is None:
            raise SessionError(
                f"the session of context {self.context.name!r} was left by a task that had not "
                "entered it"
            )
        is_here = entry.native in native.sessions.get(()) and entry.native.is_open
        is_done = not (entry.native.is_open and self.has_work)
        try:
            # A coroutine that is being closed cannot wait.
            if not is_done and kind is not GeneratorExit:
                await self.synchronize()
                is_done = True
        finally:
            self._end_in_task(entry)
            if not is_done:
                self.follow()
        # An asynchronous generator that each time another task asks for the next value.
        if not is_here and kind is None and not self.context._runtime.is_foreign:
            raise SessionError(
                f"the session of context {self.context.name!r} was left by another task or thread "
                "than the one that had entered it: what ran there was outside of it"
            )

    # More ways to use it -------------------------------------------------------------------------

    async def synchronize(
        self,
        target: "ContextStream | ContextEvent | torch.cuda.Stream | torch.cuda.Event | None" = None,
    ) -> None:
        """Suspend the calling task until work on the device is done; other tasks go on.

        Args:
            target: the stream or the event to wait for; by default the context's own stream.

        Raises:
            TypeError: ``target`` is neither.
            SessionError: no asyncio event loop runs in this thread.
            ContextDestroyedError: the context has been destroyed.
            DeviceError: the work failed.
        """
        self.context._require_alive()
        device = self.context._runtime.device
        if target is None:
            target = self.context.stream
        await event_loop.wait(*completion_of(target, device))

    async def to_thread(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``fn`` in a thread of the loop's default executor, in a session of the context.

        As ``asyncio.to_thread``, which is in the context of the calling task: use this one to be in
        the session's, entered or not. The context stays active until the call has ended, also if
        the calling task is cancelled meanwhile. No thread is taken before it is the session's turn.

        Raises:
            ContextDestroyedError: the context has been destroyed.
            SessionError: no asyncio event loop runs in this thread.
            SessionTimeoutError: as on entering.
        """
        loop = event_loop.running_loop()
        ticket = native.queue_up(self.context._native)
        variables = contextvars.copy_context()
        hold: native.Hold | None = None
        begun = threading.Lock()  # taken by whichever comes first: the call, or its cancellation

        def call() -> R:
            nonlocal hold
            if not begun.acquire(blocking=False):
                raise asyncio.CancelledError
            self.enter(ticket)
            hold = None
            try:
                return variables.run(fn, *args, **kwargs)
            finally:
                self.exit()

        try:
            _kept: native.Hold | native.Job | None = await self._let_in(ticket)
            hold = native.Hold(self.context._native)
            _kept = None
            return await loop.run_in_executor(None, call)
        except BaseException:
            # It may be long before the executor drops what it will not call.
            if ticket is not None and begun.acquire(blocking=False):
                ticket.end()
            raise

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Have every call of ``fn`` run in the session.

        A generator, synchronous or asynchronous, is in it whenever it runs, and not while it waits
        for whoever consumes it.

        Raises:
            TypeError: ``fn`` cannot be called.
        """
        if not callable(fn):
            raise TypeError(f"a session decorates callables, got {type(fn).__name__} {fn!r}")
        return decorated(self, fn)

    def __repr__(self) -> str:
        return f"<ContextSession of {self.context.name!r}>"


def _lasting(frame: FrameType) -> int:
    # contextlib's exit stacks enter and exit from different ones.
    return 0 if frame.f_globals.get("__name__") == "contextlib" else id(frame)

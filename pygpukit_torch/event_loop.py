"""What sessions need of an asyncio event loop, without a patch of asyncio.

A task's open entries are in the context variable ``native.sessions``. As long as anybody on a loop
is in a session, the loop's own ``call_soon`` and the like are wrapped, on the instance: a callback
whose ``contextvars`` context has entries runs between "this thread works in the innermost one" and
"it works in what it did before". So each step of a task finds its own stream and context, however
it is resumed. Loops without sessions are as they were.
"""

import asyncio
import contextlib
import contextvars
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from pygpukit_torch import native
from pygpukit_torch.errors import SessionError

# The methods that schedule callbacks, with the position of the callback in their arguments.
_SCHEDULERS = {
    "call_soon": 0,
    "call_soon_threadsafe": 0,
    "call_later": 1,
    "call_at": 1,
    "add_reader": 1,
    "add_writer": 1,
    "add_signal_handler": 1,
}

# How often who waits looks for himself, in seconds: where there is an alarm, because it may stay
# silent once the device has failed; and where there is none.
_PATIENCE, _INTERVAL = 0.25, 0.001

_eager_task_factory = getattr(asyncio, "eager_task_factory", object())  # new in Python 3.12


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the asyncio loop that runs in this thread. Raises SessionError if there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise SessionError(
            "'async with' a session, and waiting for one, take a running asyncio event loop"
        ) from None


# The loop's attribute that its _Wrapped is kept in: no table of ours then keeps a loop alive.
_ATTRIBUTE = "_pygpukit_sessions"


class _Wrapped:
    """A loop whose scheduling is wrapped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self._turns: _Turns | None = None
        self._own: dict[str, Any] = {}  # what the instance itself had by these names
        self._ours: dict[str, Any] = {}
        try:
            for name, position in _SCHEDULERS.items():
                self._wrap(loop, name, native.scheduler(getattr(loop, name), position))
            self._wrap(loop, "create_task", _inheriting(loop, loop.create_task))
            setattr(loop, _ATTRIBUTE, self)
        except BaseException:
            self.unwrap(loop)
            raise

    def _wrap(self, loop: asyncio.AbstractEventLoop, name: str, wrapper: Any) -> None:
        own = vars(loop).get(name)
        setattr(loop, name, wrapper)
        self._ours[name] = wrapper
        if own is not None:
            self._own[name] = own

    def turns(self, loop: asyncio.AbstractEventLoop) -> "_Turns":
        """Return who waits on the loop for a turn. In the loop's thread only."""
        if self._turns is None:
            self._turns = _Turns(loop)
        return self._turns

    def unwrap(self, loop: asyncio.AbstractEventLoop) -> None:
        """Put back what was there, unless somebody else has wrapped it meanwhile."""
        if self._turns is not None:
            self._turns.close(loop)
        for name, wrapper in self._ours.items():
            if vars(loop).get(name) is not wrapper:
                continue
            delattr(loop, name)
            if name in self._own:
                setattr(loop, name, self._own[name])


class _Turns:
    """The tasks of a loop that wait for their turn. One file wakes them all."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._bell = native.TurnBell()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        # Whoever comes first may be in a session; the others are not.
        contextvars.Context().run(loop.add_reader, self._bell.fileno(), self._ring)

    def _ring(self) -> None:
        for number in self._bell.take():
            self._wake(number)

    def _wake(self, number: int) -> None:
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_result(None)

    async def wait(self, ticket: native.SessionTicket, timeout: float | None) -> None:
        """Suspend the task until the ticket is not waiting any more, or the time is over."""
        loop = asyncio.get_running_loop()
        future = self._waiting[ticket.number] = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self._wake, ticket.number)
        try:
            ticket.notify(self._bell)
            await future
        finally:
            del self._waiting[ticket.number]
            if timer is not None:
                timer.cancel()

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nobody waits any more."""
        if not loop.is_closed():
            loop.remove_reader(self._bell.fileno())


# The collector may end a forgotten task at any time, in the middle of what follows, too.
_lock = threading.RLock()


def _renew_lock_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock_in_child)


class Membership:
    """As long as there is one that has not ended, the loop's steps follow their sessions.

    Raises:
        SessionError: the loop's methods cannot be wrapped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        if hasattr(loop, "_nest_patched"):
            raise SessionError(
                f"sessions cannot follow the tasks of {type(loop).__name__}: nest_asyncio lets it "
                "run other tasks in the middle of a step"
            )
        with _lock:
            while True:
                try:
                    wrapped = getattr(loop, _ATTRIBUTE, None) or _Wrapped(loop)
                except (AttributeError, TypeError) as error:
                    raise SessionError(
                        f"sessions cannot follow the tasks of {type(loop).__name__}, whose methods "
                        f"cannot be wrapped: {error}"
                    ) from None
                wrapped.users += 1
                if getattr(loop, _ATTRIBUTE, None) is wrapped:
                    break
            self._loop = loop

    async def turn(self, ticket: native.SessionTicket, timeout: float | None) -> None:
        """Suspend the task while the ticket is waiting, ``timeout`` seconds at most."""
        assert self._loop is not None
        turns = getattr(self._loop, _ATTRIBUTE).turns(self._loop)
        await turns.wait(ticket, timeout)

    def end(self) -> None:
        """Take this one away. Once is enough, and being forgotten does it, too."""
        with _lock:
            loop, self._loop = self._loop, None
            if loop is None:
                return
            wrapped = getattr(loop, _ATTRIBUTE)
            wrapped.users -= 1
            if wrapped.users == 0:
                delattr(loop, _ATTRIBUTE)
                wrapped.unwrap(loop)

    __del__ = end


def innermost(entries: tuple[native.TaskEntry, ...]) -> native.TaskEntry | None:
    """Return the last open one."""
    return next((entry for entry in reversed(entries) if entry.is_open), None)


def _inheriting(
    loop: asyncio.AbstractEventLoop, create_task: Callable[..., asyncio.Task[Any]]
) -> Callable[..., asyncio.Task[Any]]:
    """Wrap ``loop.create_task``: a task made in a session is in it for its whole life."""

    def create(
        coro: Any, *, context: contextvars.Context | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        outer = innermost(native.sessions.get(()))
        if context is None:
            if outer is None:
                return create_task(coro, **options)
            variables = contextvars.copy_context()
            # Not every task factory takes a context: the task will copy this one.
            make = partial(create_task, coro, **options)
            entries: tuple[native.TaskEntry, ...] = ()
        else:
            make = partial(create_task, coro, context=context, **options)
            entries = context.get(native.sessions, ())
            inner = innermost(entries)
            if outer is None or inner is None or inner.context is not outer.context:
                # Other tasks' variables, or none's: their sessions are theirs. An eager first step
                # would run in this one's.
                if loop.get_task_factory() is _eager_task_factory:
                    return asyncio.Task(coro, loop=loop, context=context, **options)
                return make()
            variables = context
        ticket = native.SessionTicket.inherited()
        inherited = native.TaskEntry(outer.context, None, ticket)
        membership = Membership(loop)

        def end(_: object = None) -> None:
            inherited.close()
            membership.end()

        # The caller may want to share his own variables, which cannot be entered twice.
        with contextlib.suppress(RuntimeError):
            variables.run(native.sessions.set, (*entries, inherited))
        # An eager task runs its first step right here.
        make = partial(native.run_step_of, variables, make)
        try:
            task = make() if context is not None else variables.run(make)
        except BaseException:
            end()
            raise
        if task.done():
            end()
        else:
            task.add_done_callback(end, context=contextvars.Context())
        return task

    return create


async def finish(job: native.Job) -> None:
    """Suspend the task until the job is done. Raises what it failed with."""
    await wait(job.is_done, job.notify)
    job.result()


async def turn(ticket: native.SessionTicket, timeout: float | None) -> None:
    """Suspend the task until it is the ticket's turn. The caller ends it if this fails.

    Raises:
        SessionTimeoutError: it was not within ``timeout`` seconds.
        SessionError: no loop runs here that sessions can follow.
    """
    if ticket.is_waiting and timeout != 0:
        membership = Membership(running_loop())
        try:
            await membership.turn(ticket, timeout)
        finally:
            membership.end()
    if ticket.is_waiting:
        ticket.give_up(timeout)


async def wait(is_done: Callable[[], bool], notify: Callable[[native.Alarm], None] | None) -> None:
    """Suspend the task until ``is_done()``, for which ``notify`` is to ring an alarm.

    Without ``notify`` it asks every millisecond. Raises what the two raise.
    """
    loop = running_loop()
    if is_done():
        return
    if notify is None:
        while not is_done():
            await asyncio.sleep(_INTERVAL)
        return
    alarm = native.Alarm()
    woken: asyncio.Future[None] | None = None

    def wake() -> None:
        if woken is not None and not woken.done():
            woken.set_result(None)

    def ring() -> None:
        loop.remove_reader(alarm.fileno())
        wake()

    loop.add_reader(alarm.fileno(), ring)
    try:
        notify(alarm)
        while not is_done():
            woken = loop.create_future()
            timer = loop.call_later(_PATIENCE, wake)
            try:
                await woken
            finally:
                timer.cancel()
    finally:
        loop.remove_reader(alarm.fileno())

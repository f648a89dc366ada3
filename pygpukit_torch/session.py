"""Sessions: the part of a program that works in a context."""

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Generator
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch

from pygpukit_torch import event_loop, native
from pygpukit_torch.errors import SessionError
from pygpukit_torch.streams import ContextEvent, ContextStream, completion_of

if TYPE_CHECKING:
    from pygpukit_torch.context import ExecutionContext

P = ParamSpec("P")
R = TypeVar("R")


class _Entry(NamedTuple):
    """A session entered by a task of an event loop, or by a callback of one."""

    native: native.TaskEntry
    loop: asyncio.AbstractEventLoop
    step: int  # the number of the step; 0 if the loop did not know yet that there are sessions


class ContextSession(native.Session):
    """What :func:`pygpukit_torch.context_session` returns.

    For ``with`` and ``async with``; also a decorator. Re-entrant, and usable by several threads and
    tasks at once.

    Attributes:
        context: the context that the session works in.
    """

    # Entering and leaving by threads is native. In a running event loop the native __enter__ and
    # __exit__ call the _in_task methods.

    def __init__(self, context: "ExecutionContext", *, wait: bool = True) -> None:
        super().__init__(context._native, wait)
        self.context = context
        self._entries: list[_Entry] = []

    # Tasks ---------------------------------------------------------------------------------------

    def _begin_in_task(self) -> _Entry:
        loop = event_loop.running_loop()
        task = asyncio.current_task()
        entries = native.sessions.get(())
        outer = event_loop.innermost(entries)
        if outer is not None and outer.owner not in (0, id(task)):
            self._refuse_shared_variables(loop, outer)
        event_loop.join(loop)
        try:
            entry = _Entry(
                native.TaskEntry(self.context._native, id(task)), loop, native.step_number()
            )
            self.begin()
        except BaseException:
            event_loop.leave(loop)
            raise
        native.sessions.set((*(entry for entry in entries if entry.is_open), entry.native))
        self._entries.append(entry)
        return entry

    def _refuse_shared_variables(
        self, loop: asyncio.AbstractEventLoop, outer: native.TaskEntry
    ) -> None:
        # Two tasks whose steps alternate cannot have one stack of sessions. One that has ended can
        # leave it to the next: that is how asyncio.Runner and test fixtures work.
        if outer.owner in map(id, asyncio.all_tasks(loop)):
            raise SessionError(
                f"context {self.context.name!r} cannot be entered: another task, which shares this "
                f"one's contextvars, is in context {outer.context.name!r}; make tasks with "
                "create_task(), each with contextvars of its own"
            )

    def _end_in_task(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        entry.native.close()
        entries = native.sessions.get(())
        if entry.native in entries:
            native.sessions.set(tuple(other for other in entries if other is not entry.native))
            if native.step_number():
                native.follow_task()
        event_loop.leave(entry.loop)

    def _entry_of_task(self) -> _Entry | None:
        for one in reversed(native.sessions.get(())):
            for entry in self._entries:
                if entry.native is one:
                    return entry
        # Left by another task than the one that entered: the loop finishes forgotten generators so.
        return self._entries[-1] if self._entries else None

    def _enter_in_task(self) -> "ContextSession":
        """``with`` in an event loop: native.Session.__enter__ calls it."""
        entry = self._begin_in_task()
        try:
            if entry.step:
                native.follow_task()
            else:
                self.enter()
        except BaseException:
            self._end_in_task(entry)
            raise
        return self

    def _exit_in_task(self) -> None:
        entry = self._entry_of_task()
        if entry is None:
            self.exit()
            return
        try:
            if not entry.step:
                self.exit()
            elif entry.native.is_open:  # not in a forked child
                self.finish()
        finally:
            self._end_in_task(entry)
        if entry.step != native.step_number():
            raise SessionError(
                f"the session of context {self.context.name!r} was entered by 'with' and held "
                "across an 'await': use 'async with'"
            )

    async def __aenter__(self) -> "ContextSession":
        entry = self._begin_in_task()
        if entry.step:
            native.follow_task()
            return self
        try:
            # This step began before the loop knew of the session; the next one is in it.
            await asyncio.sleep(0)
            if not native.step_number():
                raise SessionError(
                    f"sessions cannot follow the tasks of {type(entry.loop).__name__}: it does not "
                    "run their steps by call_soon()"
                )
        except BaseException:
            self._end_in_task(entry)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entry = self._entry_of_task()
        if entry is None:
            raise SessionError(
                f"the session of context {self.context.name!r} was left without being entered"
            )
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
        await event_loop.wait(*completion_of(target or self.context.stream, device))

    async def to_thread(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``fn`` in a thread of the loop's default executor, in a session of the context.

        As ``asyncio.to_thread``, which is in the context of the calling task: use this one to be in
        the session's, entered or not. The context stays active until the call has ended, also if
        the calling task is cancelled meanwhile.

        Raises:
            ContextDestroyedError: the context has been destroyed.
            SessionError: no asyncio event loop runs in this thread.
        """
        loop = event_loop.running_loop()
        hold = native.Hold(self.context._native)
        variables = contextvars.copy_context()

        def call() -> R:
            nonlocal hold
            with self:
                del hold
                return variables.run(fn, *args, **kwargs)

        return await loop.run_in_executor(None, call)

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Have every call of ``fn`` run in the session.

        A generator, synchronous or asynchronous, is in it whenever it runs, and not while it waits
        for whoever consumes it.

        Raises:
            TypeError: ``fn`` cannot be called.
        """
        if not callable(fn):
            raise TypeError(f"a session decorates callables, got {type(fn).__name__} {fn!r}")
        wrapper: Any
        if inspect.iscoroutinefunction(fn):
            wrapper = _around_coroutine
        elif inspect.isasyncgenfunction(fn):
            wrapper = _around_async_generator
        elif inspect.isgeneratorfunction(fn):
            wrapper = _around_generator
        else:
            wrapper = _around_function
        decorated: Callable[P, R] = wrapper(self, fn)
        return decorated

    def __repr__(self) -> str:
        return f"<ContextSession of {self.context.name!r}>"


def _around_function(session: ContextSession, fn: Any) -> Any:
    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with session:
            return fn(*args, **kwargs)

    return call


def _around_coroutine(session: ContextSession, fn: Any) -> Any:
    @wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        async with session:
            return await fn(*args, **kwargs)

    return call


def _around_generator(session: ContextSession, fn: Any) -> Any:
    @wraps(fn)
    def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        generator = fn(*args, **kwargs)
        advance: Callable[[], Any] = partial(next, generator)
        while True:
            with session:
                try:
                    value = advance()
                except StopIteration as end:
                    return end.value
            try:
                sent = yield value
            except GeneratorExit:
                with session:
                    generator.close()
                raise
            except BaseException as error:
                advance = partial(generator.throw, error)
            else:
                advance = partial(generator.send, sent)

    return generate


def _around_async_generator(session: ContextSession, fn: Any) -> Any:
    @wraps(fn)
    async def generate(*args: Any, **kwargs: Any) -> Any:
        generator = fn(*args, **kwargs)
        advance: Callable[[], Any] = generator.__anext__
        while True:
            async with session:
                try:
                    value = await advance()
                except StopAsyncIteration:
                    return
            try:
                sent = yield value
            except GeneratorExit:
                async with session:
                    await generator.aclose()
                raise
            except BaseException as error:
                advance = partial(generator.athrow, error)
            else:
                advance = partial(generator.asend, sent)

    return generate

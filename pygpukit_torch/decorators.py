"""Sessions as decorators: functions, coroutines and generators that run in a session."""

import inspect
from collections.abc import Callable, Generator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from pygpukit_torch.session import ContextSession

P = ParamSpec("P")
R = TypeVar("R")


def decorated(session: "ContextSession", fn: Callable[P, R]) -> Callable[P, R]:
    """Return ``fn`` so that it is in the session whenever it runs."""
    around: Any = _around_function
    if inspect.iscoroutinefunction(fn):
        around = _around_coroutine
    elif inspect.isgeneratorfunction(fn):
        around = _around_generator
    elif inspect.isasyncgenfunction(fn):
        around = _around_async_generator
    result: Callable[P, R] = around(session, fn)
    return result


def _around_coroutine(session: "ContextSession", fn: Any) -> Any:
    @wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> Any:
        async with session:
            return await fn(*args, **kwargs)

    return call


def _around_function(session: "ContextSession", fn: Any) -> Any:
    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with session:
            result = fn(*args, **kwargs)
        # What has only been made so far must run in the session, too.
        if inspect.iscoroutine(result):
            return _around_coroutine(session, lambda: result)()
        if inspect.isgenerator(result):
            return _around_generator(session, lambda: result)()
        if inspect.isasyncgen(result):
            return _around_async_generator(session, lambda: result)()
        return result

    return call


def _around_generator(session: "ContextSession", fn: Any) -> Any:
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


def _around_async_generator(session: "ContextSession", fn: Any) -> Any:
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

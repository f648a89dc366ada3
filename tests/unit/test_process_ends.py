"""A process ends as with plain torch, whatever is open, alive or under way."""

import signal
import subprocess
import sys
import textwrap

import pytest

PLAIN = """
    import asyncio, atexit, os, signal, sys, threading, time
    from concurrent.futures import ThreadPoolExecutor
    import torch
"""
BEGIN = f"""{PLAIN}
    import pygpukit_torch as pgk
    from pygpukit_torch import MB, context_session, create_context
    pgk.initialize(device="cpu", total_vram=256 * MB)
    a, b = create_context("a", 64 * MB), create_context("b", 64 * MB)
    with context_session(b):
        filled = torch.ones(2 * MB)
    session = context_session(a)
    session.__enter__()
    kept = torch.ones(MB)
"""
ENDS = {
    "nothing more": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("raise ValueError", 1),
    "an interrupt": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", -signal.SIGINT),
    "left at exit": ("atexit.register(session.__exit__, None, None, None)", 0),
    "tensors outlive the device": (
        """
        session.__exit__(None, None, None)
        a.destroy(); b.destroy()
        pgk.shutdown()
        sys.modules["kept"] = kept
        """,
        0,
    ),
    "a daemon waits for its turn": (
        """
        queue = create_context("queue", 8 * MB, max_sessions=1)
        entered, waits = threading.Event(), threading.Event()
        def wait():
            entered.wait()
            waits.set()
            with context_session(queue):
                pass
        threading.Thread(target=wait, daemon=True).start()
        first = context_session(queue)
        first.__enter__()
        entered.set()
        waits.wait()
        time.sleep(0.1)
        """,
        0,
    ),
    "a context on its way back": ("b.evict(); b.prefetch()", 0),
    "a task in a session": (
        """
        async def task():
            async with context_session(b):
                await asyncio.sleep(100)
        async def main():
            kept = asyncio.create_task(task())
            await asyncio.sleep(0.05)
            sys.exit(4)
        asyncio.run(main())
        """,
        4,
    ),
    "a pool at work": (
        """
        def work(_):
            with context_session(b):
                return torch.ones(10).sum()
        futures = [pool.submit(work, i) for pool in [ThreadPoolExecutor(4)] for i in range(100)]
        """,
        0,
    ),
    "a forked child": (
        """
        child = os.fork()
        if child == 0:
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        """,
        0,
    ),
}
# A daemon that is in an operator then ends the process by a signal, with torch alone, too.
LINGER = """
    def linger():
        x = torch.ones(100)
        ready.set()
        while True:
            x.add_(1)
    ready = threading.Event()
    threading.Thread(target={}, daemon=True).start()
    ready.wait()
"""


def exit_status(*parts: str) -> int:
    code = "".join(textwrap.dedent(part) for part in parts)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    if ended.returncode not in (0, 1, 3, 4, -2):
        print(ended.stderr)
    return ended.returncode


@pytest.mark.parametrize("end", ENDS)
def test_the_status_is_that_of_the_end(end: str) -> None:
    code, expected = ENDS[end]
    assert exit_status(BEGIN, code) == expected


def test_a_daemon_in_an_operator_ends_it_as_with_torch_alone() -> None:
    in_session = LINGER.format("lambda: context_session(b)(linger)()")
    assert exit_status(BEGIN, in_session) == exit_status(PLAIN, LINGER.format("linger"))

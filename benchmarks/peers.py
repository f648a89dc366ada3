"""The allocators that stories compare, each in a process of its own.

A story has a module that does its work in such a process. The process is started with the name of
an allocator, and the story asks it (``started``); there the module says what answers (``serve``).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Any

import torch

from benchmarks.timings import CUDA
from pygpukit_torch import GB

OURS, NATIVE, EXPANDABLE = "pygpukit", "torch native", "torch expandable segments"
# What the environment of each says to torch.
TORCH = {
    NATIVE: "",
    EXPANDABLE: "expandable_segments:True",
    "torch cudaMallocAsync": "backend:cudaMallocAsync",
}
RESERVED = 8 * GB  # by those of RMM that begin with a pool
# What makes the resource of each, from ``rmm.mr``.
RMM: dict[str, Callable[[Any], Any]] = {
    "RMM pool": lambda mr: mr.PoolMemoryResource(mr.CudaMemoryResource(), RESERVED),
    "RMM async": lambda mr: mr.CudaAsyncMemoryResource(),
    "RMM arena": lambda mr: mr.ArenaMemoryResource(mr.CudaMemoryResource(), RESERVED),
}


def names() -> list[str]:
    """Return the allocators that there are for the device, ours first and torch's own second."""
    return [OURS, *(TORCH if CUDA else (NATIVE,)), *(RMM if CUDA and find_spec("rmm") else ())]


# In the story's process --------------------------------------------------------------------------


class PeerError(Exception):
    """A peer has no answer. The text says why, for the row that the answer was for."""


class Peer:
    """A process with an allocator, that can be asked."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process = process
        self._errors = errors

    def ask(self, question: Any) -> Any:
        """Return the answer; both are anything that JSON has.

        Raises:
            PeerError: there was an error in place of it, or the process has ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = (self._errors.read().strip() or "nothing").splitlines()[-1]
            raise PeerError(f"ended with {code}: {said}")
        reply = json.loads(line)
        if "failure" in reply:
            raise PeerError(reply["failure"])
        return reply["answer"]


@contextmanager
def started(name: str, module: str) -> Iterator[Peer]:
    """Run the module in a process, with the allocator of this name, until the block ends.

    It is ready when it has answered something; several can be made ready at the same time.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")
    }
    if TORCH.get(name):
        environment["PYTORCH_ALLOC_CONF"] = TORCH[name]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield Peer(process, errors)
        finally:
            # Allocators of others may not survive the end of the interpreter.
            process.kill()
            process.communicate()


# In the peer's -----------------------------------------------------------------------------------


def serve(prepare: Callable[[str], Callable[[Any], Any]]) -> None:
    """Answer what the process is asked, by what ``prepare`` makes of the allocator's name.

    An exception is the answer to one question, and the end only while it is prepared.
    """
    # What others print is no answer.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = prepare(sys.argv[1])
    for line in sys.stdin:
        try:
            reply = {"answer": answer(json.loads(line))}
        except Exception as error:
            text = (str(error).strip() or "no text").splitlines()[0]
            reply = {"failure": f"{type(error).__name__}: {text}"}
        print(json.dumps(reply), file=replies, flush=True)


def install(name: str) -> None:
    """Have torch use it, before anything of CUDA; what the environment says has been done."""
    if name in RMM:
        mr = plug_in_rmm()
        mr.set_current_device_resource(RMM[name](mr))


def plug_in_rmm() -> Any:
    """Have torch use the current resource of RMM, before anything of CUDA; return ``rmm.mr``."""
    torch.cuda.memory.change_current_allocator(
        import_module("rmm.allocators.torch").rmm_torch_allocator
    )
    torch.cuda.init()
    return import_module("rmm").mr

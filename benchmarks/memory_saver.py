"""What torch_memory_saver takes to move tensors out and back, in a process of its own."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

COUNT = 8
_kept: list[torch.Tensor] = []  # to the end of the process


def installed() -> str | None:
    """The version, or None where it is not installed."""
    try:
        return version("torch_memory_saver")
    except PackageNotFoundError:
        return None


def seconds(total: int, repetitions: int, retained: bool) -> dict[str, list[float]]:
    """Seconds of each way out and in for ``total`` bytes, with contents kept.

    ``retained`` keeps the host memory between two ways out.

    Raises:
        RuntimeError: it does not work here; with what it said last.
    """
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_saver", str(total), str(repetitions)],
        env={**os.environ, "TMS_RETAIN_CPU_BACKUP": "1" if retained else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        said = (result.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"ended with {result.returncode}: {said}")
    times: dict[str, list[float]] = json.loads(result.stdout.splitlines()[-1])
    return times


def _measure(total: int, repetitions: int) -> dict[str, list[float]]:
    from torch_memory_saver import torch_memory_saver as saver

    if not hasattr(type(saver), "retain_cpu_backup"):
        sys.exit("this version has no retained backup")
    # Through torch's interface for allocators; the other way needs LD_PRELOAD.
    saver.hook_mode = "torch"
    with saver.region(enable_cpu_backup=True):
        tensors = [
            torch.ones(total // COUNT, dtype=torch.uint8, device="cuda") for _ in range(COUNT)
        ]
    times: dict[str, list[float]] = {"out": [], "in": []}
    for turn in range(repetitions + 1):
        for way, move in (("out", saver.pause), ("in", saver.resume)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            move()
            torch.cuda.synchronize()
            # The first turn makes what is retained.
            if turn:
                times[way].append(time.perf_counter() - start)
    if any(tensor[-1].item() != 1 for tensor in tensors):
        sys.exit("the contents were lost")
    _kept.extend(tensors)
    return times


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
    # It ends a process that frees its memory outside of a region, as the interpreter's end would.
    os._exit(0)

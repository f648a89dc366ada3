"""The ways to share a device that ``qos`` compares."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

import pygpukit_torch as pgk
from benchmarks.beside import Border
from benchmarks.timings import CUDA, DEVICE
from pygpukit_torch import GB, MB, QoSPolicy, native

ONE_STREAM = "one stream"
TIERS = {"guaranteed": QoSPolicy.GUARANTEED, "best effort": QoSPolicy.BEST_EFFORT}
BUDGETS = dict(zip(TIERS, (6 * GB, 5 * GB) if CUDA else (256 * MB, 256 * MB), strict=True))
SHARES = (1 / 16, 1 / 2)  # of best effort; an H100 has nothing smaller than 8 of its 132 SMs


@dataclass(frozen=True)
class Sides:
    """Where the two sides of a way work, and on how many SMs.

    A graph runs with the priority of the stream that captured it; None is torch's own stream for
    that.
    """

    guaranteed: Border
    best_effort: Border
    sms: str = "all"
    capture_on: torch.cuda.Stream | None = None


@dataclass(frozen=True)
class Way:
    """A way to share the device. Its sides exist as long as their ``with`` block."""

    name: str
    sides: Callable[[], AbstractContextManager[Sides]]


def ways() -> list[Way]:
    """Return those that this machine has, the plainest first."""
    found = [Way(ONE_STREAM, _one_stream)]
    if CUDA:
        highest = min(torch.cuda.Stream.priority_range())  # type: ignore[call-arg]
        found += [
            Way("two streams", partial(_two_streams, 0)),
            Way("priority", partial(_two_streams, highest)),
        ]
    found += [Way("tiers", _tiers), Way("tiers, yielding", partial(_tiers, yields=True))]
    for share in SHARES:
        name = f"partitions {1 - share:.2f}/{share:.2f}"
        found.append(Way(name, partial(_partitions, share)))
    return found


@contextmanager
def device() -> Iterator[None]:
    """Initialize; without host memory for evictions, so that no thread of ours makes any."""
    pgk.initialize(device=DEVICE, total_vram=sum(BUDGETS.values()), host_backup=0)
    try:
        yield
    finally:
        pgk.shutdown()
        if CUDA:
            torch.cuda.empty_cache()


@contextmanager
def _one_stream() -> Iterator[Sides]:
    yield Sides(nullcontext, nullcontext)


@contextmanager
def _two_streams(priority: int) -> Iterator[Sides]:
    high, low = torch.cuda.Stream(priority=priority), torch.cuda.Stream(priority=0)
    yield Sides(partial(torch.cuda.stream, high), partial(torch.cuda.stream, low), capture_on=high)


@contextmanager
def _tiers(sms: str = "all", partitioned: bool = False, yields: bool = False) -> Iterator[Sides]:
    borders: list[Border] = []
    with ExitStack() as stack:
        for name, qos in TIERS.items():
            context = pgk.create_context(
                name,
                BUDGETS[name],
                qos=qos,
                partition=name if partitioned else None,
                yields=yields and qos is not QoSPolicy.GUARANTEED,
            )
            stack.callback(context.destroy)
            borders.append(partial(pgk.context_session, context))
        guaranteed, best_effort = borders
        yield Sides(guaranteed, best_effort, sms)


@contextmanager
def _partitions(share: float) -> Iterator[Sides]:
    manager = native.PartitionManager(native.PartitionConfig(total_memory=sum(BUDGETS.values())))
    with ExitStack() as stack:
        # The last one gets what rounding takes from the others.
        for name, part in (("best effort", share), ("guaranteed", 1 - share)):
            limits = native.PartitionLimits().memory(BUDGETS[name]).compute(part)
            manager.create_partition(name, name, limits)
            stack.callback(manager.delete_partition, name)
        counts = [manager.get_partition(name).sm_count for name in TIERS]
        sms = "all" if None in counts else "/".join(map(str, counts))
        with _tiers(sms, partitioned=True) as sides:
            yield sides

"""The records of :func:`pygpukit_torch.stats`."""

from dataclasses import dataclass

from pygpukit_torch.memory import ContextUsage
from pygpukit_torch.qos import QoSPolicy


@dataclass(frozen=True, slots=True)
class ContextStats:
    """One context in :func:`stats`. Since its creation where it counts. Sizes in bytes.

    Attributes:
        partition: the id of the partition it is in, if any.
        state: ``"destroyed"`` while live tensors remain.
        sessions: open ones. One entered within another counts, too, and so do the threads and tasks
            that were started in one.
        waiting: sessions that wait for their turn (see ``max_sessions``).
        evictions: how often pages of it were moved to host memory, and ``restores`` back.
        bytes_out: what was copied to host memory, and ``bytes_in`` back.
        pages_unchanged: pages that were moved out without a copy.
        seconds_moving: time spent on all of that.
    """

    name: str
    qos: QoSPolicy
    partition: str | None
    state: str
    usage: ContextUsage
    sessions: int
    waiting: int
    live_blocks: int
    evictions: int
    restores: int
    bytes_out: int
    bytes_in: int
    pages_unchanged: int
    seconds_moving: float


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """The device and every context at one moment. Sizes in bytes.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        capacity: what all contexts together may hold.
        reserved: what they hold.
        pooled: physical memory kept ready, for reservations and for reuse.
        available: see :func:`get_available_vram`.
        host_backup: the limit of host memory for evicted pages.
        host_reserved: host memory made for them.
        host_used: what of it holds contents, of evicted pages and of pages that have come back.
        contexts: those that live, and those destroyed whose memory is still in use.
    """

    device: str
    device_id: int
    capacity: int
    reserved: int
    pooled: int
    available: int
    host_backup: int
    host_reserved: int
    host_used: int
    contexts: tuple[ContextStats, ...]

"""The C++ side. Sizes in bytes, addresses as ints, unless said otherwise.

Used by the package and its tests; what is public of it is listed in the documentation. Bad values
raise ValueError, other failures the classes of :mod:`pygpukit_torch.errors`.
"""

import contextvars
import enum
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import torch

from pygpukit_torch.context import ExecutionContext

R = TypeVar("R")

class Refusal:
    """A request that nobody could serve, see :mod:`pygpukit_torch.refusals`."""

    class Holder:
        @property
        def name(self) -> str: ...
        @property
        def tier(self) -> Tier: ...
        @property
        def used(self) -> int: ...
        @property
        def resident(self) -> int: ...
        @property
        def evicted(self) -> int: ...
        @property
        def base(self) -> int: ...
        @property
        def in_use(self) -> bool: ...
        @property
        def pinned(self) -> bool: ...
        @property
        def orphan(self) -> bool: ...

    @property
    def context(self) -> str: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def requested(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def available(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def holders(self) -> list[Holder]: ...
    @property
    def others(self) -> int: ...

def empty_outside(bytes: int) -> torch.Tensor:
    """Bytes on the current CUDA device that belong to no context. Only with a CUDA torch."""

def find_refusal(text: str | bytes) -> Refusal | None:
    """Return the latest with which the text of an error begins, of the last 256."""

class Handle:
    """Physical memory of a device, mapped or not."""

    @property
    def id(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def on_host(self) -> bool: ...

class Fingerprint:
    """Tells contents apart."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...

class Move:
    """One handle takes another one's place at an address, with what it holds."""

    def __init__(
        self, address: int, source: Handle, target: Handle, known: Fingerprint | None = None
    ) -> None: ...
    @property
    def known(self) -> Fingerprint | None: ...
    @property
    def done(self) -> bool: ...
    @property
    def copied(self) -> bool: ...
    @property
    def contents(self) -> Fingerprint | None: ...

class Device:
    """What the core needs from a device; csrc/device/device.h has the preconditions."""

    class Call(enum.Enum):
        """The kinds of calls that can be counted and made to fail."""

        any = ...
        create = ...
        create_host = ...
        release = ...
        reserve = ...
        unreserve = ...
        map = ...
        unmap = ...
        move = ...
        create_stream = ...
        destroy_stream = ...
        copy = ...
        record = ...
        wait = ...
        synchronize = ...
        notify = ...
        drain = ...

    @property
    def name(self) -> str: ...
    @property
    def capacity(self) -> int: ...
    @property
    def granularity(self) -> int: ...
    @property
    def can_move(self) -> bool: ...
    @property
    def can_hold(self) -> bool: ...
    @property
    def processor_groups(self) -> list[int]: ...
    @property
    def why_undivided(self) -> str: ...
    def create(self, bytes: int) -> Handle: ...
    def create_host(self, bytes: int) -> Handle: ...
    def release(self, handle: Handle) -> None: ...
    def reserve(self, bytes: int, alignment: int) -> int: ...
    def unreserve(self, address: int, bytes: int) -> None: ...
    def map(self, address: int, handle: Handle) -> None: ...
    def unmap(self, address: int, handle: Handle) -> None: ...
    @property
    def holds(self) -> str:
        """Whom it holds while pages move, in words."""

    def move(self, moves: list[Move], patience: float = 10.0, gently: bool = False) -> None:
        """Carry out the moves; ``patience`` is in seconds."""

    def announce(self, stream: int) -> None: ...
    def drain(self, patience: float) -> None: ...
    def create_stream(self, priority: int = 0, processors: int = 0) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def copy(self, destination: int, source: int, bytes: int, stream: int) -> None: ...
    def record(self, stream: int) -> int: ...
    def wait(self, stream: int, event: int) -> None: ...
    def synchronize_stream(self, stream: int) -> None: ...
    def synchronize_event(self, event: int) -> None: ...
    def synchronize(self) -> None: ...
    def notify(self, event: int, alarm: Alarm) -> None: ...
    def is_done(self, event: int) -> bool: ...
    def is_idle(self, stream: int) -> bool: ...
    def is_capturing(self, stream: int) -> bool: ...
    def free_bytes(self) -> int: ...
    def inject_fault(self, n: int, call: Device.Call = ...) -> None: ...
    def count(self, call: Device.Call) -> int: ...

class HostDevice(Device):
    """Host memory as a device, with streams that can be held."""

    GRANULARITY: int
    def __init__(self, capacity: int, processor_groups: list[int] = ...) -> None: ...
    def processors(self, stream: int) -> int: ...
    def hold(self, stream: int) -> None: ...
    def let_go(self, stream: int) -> None: ...
    def set_capturing(self, stream: int, capturing: bool) -> None: ...
    @property
    def committed_bytes(self) -> int: ...
    @property
    def backup_bytes(self) -> int: ...
    @property
    def refused_moves(self) -> int:
        """How often a page was not moved because of queued work."""

class CudaDevice(Device):
    """VRAM through the driver; only in builds for a CUDA torch. Capacity 0 is all of it.

    Streams are the driver's handles, and DEFAULT_STREAM.
    """

    DEFAULT_STREAM: int
    def __init__(self, ordinal: int = 0, capacity: int = 0) -> None: ...
    @property
    def ordinal(self) -> int: ...

class Ledger:
    """Budgets, reservations and what is held."""

    def __init__(self, capacity: int, host_limit: int = 0) -> None: ...
    def open(
        self, max: int, base: int, tier: Tier = ..., partition: int = 0, page: int = 1
    ) -> int: ...
    def open_partition(self, limit: int) -> int: ...
    def close_partition(self, partition: int) -> None: ...
    def assign(self, account: int, partition: int) -> None: ...
    def close(self, account: int) -> None: ...
    def resize(self, account: int, max: int, base: int) -> None: ...
    def charge(self, account: int, bytes: int) -> None: ...
    def refund(self, account: int, bytes: int) -> None: ...
    def evict(self, account: int, bytes: int) -> None: ...
    def restore(self, account: int, bytes: int) -> None: ...
    def refund_evicted(self, account: int, bytes: int) -> None: ...
    def room(self, account: int) -> int: ...
    def restorable(self, account: int) -> int: ...
    def free_for(self, account: int) -> int: ...
    def shortage(self, account: int, bytes: int, returning: int = 0) -> int: ...
    def shortage_in_partition(self, account: int, bytes: int) -> int: ...
    def spare(self, holder: int, account: int) -> int: ...
    def evictable(self, of_loans: bool) -> int: ...
    def check_invariants(self) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def resident(self) -> int: ...
    @property
    def evicted(self) -> int: ...
    @property
    def lent(self) -> int: ...
    @property
    def uncommitted(self) -> int: ...

class Arena:
    """The blocks of one virtual range; positions and sizes in granules of 512 bytes, and pages."""

    def __init__(self, page_bytes: int, page_count: int, upper_zone: int = ...) -> None: ...
    def allocate(self, granules: int, lane: int = 0) -> int | None: ...
    def add_lane(self, upper: bool = False) -> int: ...
    def adopt(self, source: int, target: int) -> None: ...
    def release(self, start: int) -> int: ...
    def fence(self, start: int) -> int: ...
    def unfence(self, start: int) -> None: ...
    def plan_growth(self, granules: int, lane: int = 0) -> tuple[int, int] | None: ...
    def add_pages(self, first: int, count: int, lane: int = 0) -> None: ...
    def free_runs(self, beside: tuple[int, int] | None = None) -> list[tuple[int, int, int]]: ...
    def retire(self, block: int, first: int, count: int) -> None: ...
    def finish_retirement(self, first: int, count: int, removed: int) -> None: ...
    def count_free_pages(self) -> int: ...
    def check_invariants(self) -> None: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def fenced_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def resident_pages(self) -> int: ...
    @property
    def live_blocks(self) -> int: ...

class Holder:
    """A context as the planner of evictions sees it."""

    def __init__(
        self,
        id: int,
        tier: Tier,
        orphan: bool,
        active: bool,
        last_use: int,
        spare: int,
        page: int,
        mate: bool = True,
    ) -> None: ...

def plan_eviction(
    tier: Tier, of_base: bool, bytes: int, holders: list[Holder], bytes_of_mates: int = 0
) -> list[tuple[int, int, bool]]:
    """Return who gives how much, and whether it is active; see csrc/core/eviction.h."""

class PartitionConfig:
    """What partitions divide, in bytes: see docs/guide.md.

    Their memory limits add up to ``total_memory`` at most, or with ``allow_overcommit`` to
    ``overcommit_ratio`` times that.
    """

    def __init__(
        self,
        total_memory: int,
        allow_overcommit: bool = False,
        overcommit_ratio: float = 1.0,
    ) -> None: ...
    @property
    def total_memory(self) -> int: ...
    @property
    def allow_overcommit(self) -> bool: ...
    @property
    def overcommit_ratio(self) -> float: ...

class PartitionLimits:
    """What the contexts of a partition may have together. Each method returns a copy.

    Raises ValueError for shares that are not above 0 and at most 1.
    """

    def __init__(self) -> None: ...
    def memory(self, bytes: int) -> PartitionLimits:
        """Bytes of the device that they hold at a time."""

    def compute(self, share: float) -> PartitionLimits:
        """The share of the SMs, rounded down to groups of them; the last one takes the rest."""

    def bandwidth(self, share: float) -> PartitionLimits:
        """The share of the memory's bandwidth. It is only summed up: no hardware limits it."""

    def streams(self, n: int) -> PartitionLimits:
        """How many sessions are open at a time; others wait for their turn."""

    @property
    def memory_limit(self) -> int | None: ...
    @property
    def compute_limit(self) -> float | None: ...
    @property
    def bandwidth_limit(self) -> float | None: ...
    @property
    def stream_limit(self) -> int | None: ...

class PartitionUsage:
    """What the contexts of a partition hold together, in bytes, and their sessions.

    ``waiting`` counts those that wait for one of its ``streams``.
    """

    @property
    def used(self) -> int: ...
    @property
    def reserved(self) -> int: ...
    @property
    def evicted(self) -> int: ...
    @property
    def base(self) -> int: ...
    @property
    def sessions(self) -> int: ...
    @property
    def waiting(self) -> int: ...

class PartitionInfo:
    """A partition at one moment."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def limits(self) -> PartitionLimits: ...
    @property
    def usage(self) -> PartitionUsage: ...
    @property
    def memory_limit(self) -> int | None: ...
    @property
    def compute_limit(self) -> float | None: ...
    @property
    def sm_count(self) -> int | None:
        """The SMs it was granted; None without a share, or where the device cannot divide them."""

    @property
    def contexts(self) -> list[str]:
        """Their names, in the order of creation."""

class PartitionStats:
    """What the partitions of a manager have, in bytes and shares.

    Compute is available as far as no partition of the device has it, other managers' included.
    """

    @property
    def partition_count(self) -> int: ...
    @property
    def total_memory_allocated(self) -> int: ...
    @property
    def total_compute_allocated(self) -> float: ...
    @property
    def total_bandwidth_allocated(self) -> float: ...
    @property
    def available_memory(self) -> int: ...
    @property
    def available_compute(self) -> float: ...
    @property
    def available_bandwidth(self) -> float: ...

class PartitionManager:
    """Divides memory and SMs among partitions; initializes with the defaults if needed.

    Ids are unique on the device. When the manager is dropped its partitions go, those that have
    contexts once the last of these is gone. Raises ValueError for unknown ids, and after shutdown.
    """

    def __init__(self, config: PartitionConfig, manager: Manager | None = None) -> None: ...
    def create_partition(self, id: str, name: str, limits: PartitionLimits) -> PartitionInfo:
        """Make a partition; warns where the device cannot divide its SMs.

        Raises:
            ValueError: the id exists, or a limit is out of range.
            AdmissionError: the limits do not fit beside those of the others.
            DeviceError: the SMs cannot be had.
        """

    def delete_partition(self, id: str) -> None:
        """Give back what it has. Raises ContextBusyError while it has contexts."""

    def assign(self, context: object, id: str | None) -> None:
        """Move a context to the partition, or with None out of the one it is in.

        Raises:
            ContextBusyError: it has open sessions.
            ValueError: its budget is above the partition's memory limit.
            AdmissionError: what it reserves or holds does not fit.
        """

    def get_partition(self, id: str) -> PartitionInfo: ...
    def get(self, id: str) -> PartitionInfo: ...
    @property
    def partition_ids(self) -> list[str]: ...
    def stats(self) -> PartitionStats: ...

class PoolStats:
    """What a memory pool holds, in bytes, and what happened in it."""

    @property
    def quota(self) -> int: ...
    @property
    def used(self) -> int:
        """By blocks in device memory, each rounded up to its size class.

        Blocks count that were freed while tensors of them live.
        """

    @property
    def cached(self) -> int:
        """By freed blocks that are kept for reuse; part of the quota as well."""

    @property
    def available(self) -> int:
        """What fits without an eviction: the quota less what is used."""

    @property
    def allocated_bytes(self) -> int:
        """What was asked for and is not freed yet, evicted blocks included."""

    @property
    def evicted_bytes(self) -> int:
        """Of these, what is in host memory."""

    @property
    def resident(self) -> int:
        """Physical memory of the device, in pages; partly used ones can be more than the quota."""

    @property
    def free_blocks(self) -> int:
        """How many are cached."""

    @property
    def active_blocks(self) -> int:
        """How many are not freed yet, evicted ones included."""

    @property
    def allocation_count(self) -> int: ...
    @property
    def reuse_count(self) -> int:
        """How often a cached block served an allocation or a restore."""

    @property
    def eviction_count(self) -> int: ...

class MemoryBlock:
    """Memory of a pool; it is the pool's until it is freed there, and keeps the pool alive."""

    @property
    def id(self) -> int:
        """A number that the pool does not use again."""

    @property
    def size(self) -> int:
        """Bytes, as asked for."""

    @property
    def ptr(self) -> int:
        """The address; 0 while the block is evicted, and once it is freed."""

    @property
    def is_evicted(self) -> bool:
        """Whether the contents are in host memory; False once the block is freed."""

    def as_tensor(self, dtype: torch.dtype = ...) -> torch.Tensor:
        """Return a flat tensor that is the block's memory; ``torch.uint8`` unless told.

        An evicted block is restored first. As long as the tensor or a view of it lives, the block
        is not evicted, and its memory valid, also once it was freed or the pool is gone.

        Raises:
            ValueError: the size is no multiple of the item size, or the block was freed.
            MemoryError: restoring does not fit into the quota.
            DeviceError: the device failed; nothing is lost.
        """

class MemoryPool:
    """Memory of a device within a quota, with free lists, and eviction to host memory.

    Sizes are rounded up to one of four classes in each power of two. A freed block is kept for the
    next request of its class. If the quota is short, cached blocks of other classes are dropped,
    then, with ``enable_eviction``, the blocks that were not used for longest are evicted: used is
    what was allocated, touched, restored or made a tensor. Blocks with live tensors stay.

    Work on the device that uses a block is awaited before its memory serves another one. All
    methods may be called from any thread.

    Args:
        quota: bytes, at most the device's capacity; used and cached blocks never exceed it.
        enable_eviction: whether allocating and restoring may evict.
        device: where the memory is. None is the device that pygpukit_torch is initialized with, or
            a host device of the pool's own.

    Raises:
        ValueError: the quota is not positive, or above the device's capacity.
        DeviceError: the device failed.
    """

    def __init__(
        self, quota: int, enable_eviction: bool = False, device: Device | None = None
    ) -> None: ...
    def allocate(self, size: int) -> MemoryBlock:
        """Return a block of ``size`` bytes, contents undefined.

        Raises:
            MemoryError: it does not fit into the quota; nothing has changed.
            ValueError: the size is not positive.
            DeviceError: the device failed; no block is lost, and it can be tried again.
        """

    def free(self, block: MemoryBlock) -> None:
        """Take the block back. ValueError if it was freed already, or is another pool's."""

    def touch(self, block: MemoryBlock) -> None:
        """Count as a use of the block; an evicted one stays so."""

    def evict(self, block: MemoryBlock) -> None:
        """Move the contents to host memory and give up the device memory.

        Raises:
            ValueError: a tensor of the block lives, it was freed, or is another pool's.
            DeviceError: the device failed; the block is as it was.
        """

    def restore(self, block: MemoryBlock) -> None:
        """Move the contents back, possibly to another address.

        Raises:
            MemoryError: it does not fit into the quota; the block is evicted still.
            DeviceError: the device failed; the block is evicted still.
        """

    def clear(self) -> None:
        """Free all blocks, and give all memory back to the device but that of live tensors."""

    def stats(self) -> PoolStats: ...
    def check_invariants(self) -> None: ...
    @property
    def device(self) -> Device: ...

class QosDecision(enum.StrEnum):
    """What becomes of a task; equal to its name."""

    admit = "admit"
    throttle = "throttle"
    """Admitted, but with less than it could use: a lower bandwidth, or not all of its limit."""

    queue = "queue"
    """It does not fit now, or others wait that go first."""

    reject = "reject"
    """It asks for more than there is in all."""

class QosTaskMeta:
    """What a task asks for, in bytes and in shares of the device's bandwidth.

    Shares are kept in billionths, rounded down.

    Raises:
        ValueError: the id is empty, a size is not positive, a share is not between 0 and 1, or
            ``burst_ratio`` is below 1 or infinite.
    """

    @staticmethod
    def guaranteed(
        id: str, name: str, memory: int, *, bandwidth_request: float = 0.0
    ) -> QosTaskMeta:
        """Gets all that it asks for, or waits."""

    @staticmethod
    def burstable(
        id: str,
        name: str,
        memory_request: int,
        burst_ratio: float,
        *,
        bandwidth_request: float = 0.0,
    ) -> QosTaskMeta:
        """Gets its memory request, and may use ``burst_ratio`` times as much where it is free.

        If less bandwidth is left than it asks for, it gets that.
        """

    @staticmethod
    def best_effort(id: str, name: str) -> QosTaskMeta:
        """Runs on what is left, without a reservation."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def qos_class(self) -> Tier: ...
    @property
    def memory_request(self) -> int: ...
    @property
    def memory_limit(self) -> int:
        """The request times ``burst_ratio``; the largest size there is for best effort."""

    @property
    def burst_ratio(self) -> float: ...
    @property
    def bandwidth_request(self) -> float: ...

class QosEvaluation:
    """How a task was judged, at one moment."""

    @property
    def task_id(self) -> str: ...
    @property
    def qos_class(self) -> Tier: ...
    @property
    def priority(self) -> int:
        """100 for guaranteed, 50 for burstable, 0 for best effort."""

    @property
    def admitted(self) -> bool:
        """Whether the decision is ``admit`` or ``throttle``."""

    @property
    def decision(self) -> QosDecision: ...
    @property
    def reason(self) -> str:
        """A sentence with figures; empty for ``admit``."""

    @property
    def reserved_memory(self) -> int:
        """The memory request; 0 if not admitted."""

    @property
    def reserved_bandwidth(self) -> float:
        """The bandwidth request, or what it gets if that is less; 0 if not admitted."""

class QosStats:
    """What an evaluator has admitted: bytes, shares and numbers of tasks."""

    @property
    def total_memory(self) -> int: ...
    @property
    def total_bandwidth(self) -> float: ...
    @property
    def guaranteed_memory(self) -> int: ...
    @property
    def guaranteed_bandwidth(self) -> float: ...
    @property
    def burstable_memory(self) -> int: ...
    @property
    def burstable_bandwidth(self) -> float: ...
    @property
    def available_memory(self) -> int:
        """What is not reserved."""

    @property
    def available_bandwidth(self) -> float: ...
    @property
    def admitted(self) -> int: ...
    @property
    def queued(self) -> int:
        """Tasks of all tiers that wait."""

    @property
    def best_effort_queue(self) -> int:
        """Those of them that are best effort."""

class QosPolicyEvaluator:
    """Decides which tasks are admitted to a device, or a part of it, and keeps the books.

    Nothing is allocated: it decides with the rules of ``create_context``, for tasks whose memory
    somebody else manages. The sum of what is reserved never exceeds the totals. Waiting tasks are
    admitted strictly in the order of their priority, then first come: one that does not fit holds
    up those behind it. All methods may be called from any thread.

    Args:
        total_memory: bytes.
        total_bandwidth: a share of the device's, above 0 and at most 1.

    Raises:
        ValueError: there is no memory or no bandwidth, or the bandwidth is above 1.
    """

    def __init__(self, total_memory: int, total_bandwidth: float = 1.0) -> None: ...
    def evaluate(self, task: QosTaskMeta) -> QosEvaluation:
        """Judge the task as a newcomer, beside what is reserved and behind who waits.

        Changes nothing.
        """

    def reserve(self, evaluation: QosEvaluation) -> None:
        """Reserve what the evaluation says, or put the task into the queue if it says so.

        Raises:
            AdmissionError: the evaluation no longer holds, since others came or went in between;
                evaluate again. Nothing has changed.
            ValueError: the decision was ``reject``, or the task is reserved or queued already.
        """

    def release(self, task_id: str) -> list[QosEvaluation]:
        """End a task, or take it out of the queue.

        Returns:
            Those who were admitted from the queue for it and are now reserved, in order.

        Raises:
            ValueError: no such task is reserved or queued.
        """

    def stats(self) -> QosStats: ...
    def reset(self) -> None:
        """Forget all tasks, those that wait as well."""

class Tier(enum.Enum):
    """See :class:`pygpukit_torch.QoSPolicy`."""

    best_effort = ...
    burstable = ...
    guaranteed = ...

class Usage:
    """What one context uses."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def partition(self) -> str: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def orphan(self) -> bool: ...
    @property
    def used(self) -> int: ...
    @property
    def resident(self) -> int: ...
    @property
    def max(self) -> int: ...
    @property
    def base(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def small_peak(self) -> int: ...
    @property
    def large_peak(self) -> int: ...
    @property
    def peak_resident(self) -> int: ...
    @property
    def fenced(self) -> int: ...
    @property
    def evicted(self) -> int: ...
    @property
    def available(self) -> int: ...
    @property
    def live_blocks(self) -> int: ...
    @property
    def sessions(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def counters(self) -> Counters: ...

class DeviceUsage:
    """What a device holds and for whom."""

    @property
    def capacity(self) -> int: ...
    @property
    def resident(self) -> int: ...
    @property
    def pooled(self) -> int: ...
    @property
    def available(self) -> int: ...
    @property
    def host_limit(self) -> int: ...
    @property
    def host_existing(self) -> int: ...
    @property
    def host_taken(self) -> int: ...
    @property
    def contexts(self) -> list[Usage]: ...

class Counters:
    """What happened in a context since its creation."""

    @property
    def allocations(self) -> int: ...
    @property
    def frees(self) -> int: ...
    @property
    def growths(self) -> int: ...
    @property
    def refusals(self) -> int: ...
    @property
    def pages_mapped(self) -> int: ...
    @property
    def pages_unmapped(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def small_allocations(self) -> int: ...
    @property
    def small_frees(self) -> int: ...
    @property
    def small_allocated_bytes(self) -> int: ...
    @property
    def small_freed_bytes(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def restores(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def pages_unchanged(self) -> int: ...
    @property
    def move_nanoseconds(self) -> int: ...

class Totals:
    """Sums over all contexts, those that are gone included."""

    @property
    def counters(self) -> Counters: ...
    @property
    def used(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def fenced(self) -> int: ...
    @property
    def live_blocks(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def existing(self) -> int: ...
    @property
    def existing_peak(self) -> int: ...
    @property
    def created(self) -> int: ...

class Context:
    """A context; allocate() raises torch.OutOfMemoryError."""

    def allocate(self, bytes: int, stream: int | None = None) -> int: ...
    def try_allocate(self, bytes: int, stream: int | None = None, may_wait: bool = True) -> int: ...
    def free(self, address: int) -> None: ...
    def free_after(self, address: int, streams: list[int]) -> None: ...
    def free_after_event(self, address: int, event: int) -> None:
        """Free it for work on any stream, all of which is done with the event."""
    def record_use(self, address: int, stream: int) -> None: ...
    def block_bytes(self, address: int) -> int: ...
    def capture_stream(self) -> int:
        """Return a stream of the context for captures."""
    def set_partition_gate(self, gate: SessionGate | None) -> None:
        """Only while no session is open."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def yields(self) -> bool: ...
    @property
    def stream(self) -> int: ...
    @property
    def streams(self) -> list[int]: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def is_destroyed(self) -> bool: ...
    @property
    def sessions(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def is_ready(self) -> bool:
        """Whether a session can begin without waiting for pages that move or come back."""

    @property
    def is_moving(self) -> bool: ...
    @property
    def manager(self) -> Manager: ...
    @property
    def counters(self) -> Counters: ...

class SessionGate:
    """How many sessions of the contexts that have it may be open at a time."""

    def __init__(self, owner: str, limit: int) -> None: ...
    @property
    def limit(self) -> int: ...
    @property
    def open(self) -> int: ...
    @property
    def waiting(self) -> int: ...

class TurnBell:
    """A file that becomes readable when it is the turn of tickets that were told to ring it."""

    def fileno(self) -> int: ...
    def take(self) -> list[int]:
        """Return the numbers of those since the last time."""

class SessionTicket:
    """An entry as far as gates are concerned. Ended when it is forgotten."""

    @staticmethod
    def inherited(around: list[SessionTicket] = ...) -> SessionTicket | None:
        """For what is started here and now, and is in the context by that.

        Where other tickets than those of the calling thread and task count, they are ``around``.
        """

    @property
    def number(self) -> int: ...
    @property
    def is_waiting(self) -> bool: ...
    def notify(self, bell: TurnBell) -> None:
        """Ring it once the ticket is not waiting."""

    def end(self) -> None:
        """Give up the place in the queue, or the slots. Once is enough."""

    def give_up(self, seconds: float | None) -> NoReturn:
        """End it and raise SessionTimeoutError; or without ``seconds``, how long it has waited,
        the SessionError that the thread must not wait.
        """

def queue_up(context: Context, around: list[SessionTicket] = ...) -> SessionTicket | None:
    """Get a ticket for an entry made here and now; None if the context has no gates, or is gone.

    Where other tickets than those of the calling thread and task count, they are ``around``.
    """

class Job:
    """Work that blocks, in a thread of its own."""

    @staticmethod
    def begin_session(context: Context) -> Job:
        """Bring the context back, and keep it active as long as the job lives."""

    @staticmethod
    def evict(context: Context) -> Job: ...
    @staticmethod
    def restore(context: Context) -> Job: ...
    @staticmethod
    def join(context: Context) -> Job: ...
    def is_done(self) -> bool: ...
    def notify(self, alarm: Alarm) -> None:
        """Ring it once the job is done."""

    def result(self) -> None:
        """Raise what the job failed with. It must be done."""

class Session:
    """Makes a context the calling thread's.

    In a running event loop, ``with`` is up to subclasses: their ``_enter_in_task`` is called, and
    their ``_exit_in_task``, also wherever the thread has not entered the session itself.
    """

    def __init__(
        self, context: Context, ordered: bool = True, keeps_active: bool = True
    ) -> None: ...
    def enter(self, ticket: SessionTicket | None = None) -> None:
        """Enter without waiting for a turn. The ticket ends with the entry, or if this fails."""

    def exit(self) -> None: ...
    def leave(self) -> None:
        """Exit without waiting for the work."""

    def begin(self) -> None:
        """Do what entering does on the device, and refuse what it refuses."""

    @property
    def has_work(self) -> bool:
        """Whether leaving would have to wait."""

    def finish(self) -> None:
        """Wait as leaving does."""

    def follow(self) -> None:
        """Let the thread's later work wait instead, on the device where it can."""

    def restore_stream(self, stream: int) -> None:
        """Make it the thread's stream, after the session was left in the step it began in."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class BoundSession(Session):
    """A session of an ExecutionContext."""

    _timeout: float | None

    def __init__(
        self, context: ExecutionContext, wait: bool = True, timeout: float | None = None
    ) -> None: ...
    @property
    def context(self) -> ExecutionContext: ...

class Hold:
    """Keeps a context active as long as it lives."""

    def __init__(self, context: Context) -> None: ...
    @staticmethod
    def take_if_ready(context: Context) -> Hold | None:
        """Return None where that would wait or refuse."""

class TaskEntry:
    """That a task is in a context; keeps it active until it is closed or forgotten."""

    def __init__(
        self, context: Context, task: object, ticket: SessionTicket | None = None
    ) -> None: ...
    def close(self) -> bool: ...
    @property
    def is_open(self) -> bool:
        """False also in other threads than the one that made it, and in a forked child."""

    def is_by(self, task: object) -> bool:
        """Whether it is that task's."""

    @property
    def is_of_these_variables(self) -> bool:
        """Whether it was entered in the contextvars that are current now, not in a copy of them."""

    @property
    def context(self) -> Context: ...

sessions: contextvars.ContextVar[tuple[TaskEntry, ...]]

def run_step(callback: Callable[..., R], /, *args: Any) -> R:
    """Call it in the innermost of ``sessions``; a step of a task."""

def run_step_of(
    context: contextvars.Context, callback: Callable[..., R], /, *args: Any, **kwargs: Any
) -> R:
    """Call it in the innermost of the ``sessions`` in ``context``, as a step of its task."""

def scheduler(own: Callable[..., R], position: int) -> Callable[..., R]:
    """Wrap a method that schedules the callback at ``position``: those in a session as a step."""

def step_number() -> int:
    """Return the number of the task's step that runs; 0 if its loop does not run it as one."""

def follow_task() -> int:
    """Have the present step go on in what is the innermost of ``sessions`` by now.

    Return what the thread's stream was, for :meth:`Session.restore_stream`.
    """

class Alarm:
    """A file that becomes readable when Device.notify() rings it."""

    def fileno(self) -> int: ...

class ThreadStreams:
    """What sessions switch."""

def host_streams() -> ThreadStreams: ...
def current_host_stream() -> int:
    """Return the calling thread's stream on the host device, 0 outside of sessions."""

class Manager:
    """A device and the contexts on it."""

    def __init__(
        self,
        device: Device,
        thread_streams: ThreadStreams | None = None,
        host_backup: int = 0,
        claim_timeout: float = 10.0,
    ) -> None: ...
    def create_context(
        self,
        name: str,
        max: int,
        base: int = 0,
        tier: Tier = Tier.burstable,
        partition: str = "",
        yields: bool = False,
        max_sessions: int = 0,
    ) -> Context: ...
    def destroy_context(self, context: Context) -> None: ...
    def resize_context(self, context: Context, max: int, base: int) -> None: ...
    def evict_context(self, context: Context) -> None: ...
    def restore_context(self, context: Context) -> None: ...
    def pin(self, context: Context) -> None: ...
    def unpin(self, context: Context) -> None: ...
    def declare_consumer(self, producer: Context, consumer: Context) -> None: ...
    def join(self, context: Context) -> None:
        """Wait until no page of the context is on its way."""

    @property
    def device_holds(self) -> bool:
        """Whether the device holds whoever is at work while pages move."""

    def set_pressure_handler(self, handler: Callable[[Context, int, int], bool] | None) -> None: ...
    def set_reliefs(self, reliefs: list[Callable[[bool], bool]]) -> None:
        """Have these asked, in this order, before others give way.

        Each is told whether the device is short, and returns whether something may have come free.
        """

    def give_way(self, bytes: int) -> bool: ...
    def usage(self, context: Context) -> Usage: ...
    def device_usage(self) -> DeviceUsage: ...
    def available(self) -> int: ...
    def totals(self) -> Totals: ...
    def reset_peaks(self, context: Context | None = ...) -> None:
        """Let peaks start again from what there is, of all contexts or of one."""
    def trim(self) -> int: ...
    def stop_making_ahead(self) -> None: ...
    def shut_down(self) -> None: ...
    def check_invariants(self) -> None: ...
    @property
    def device(self) -> Device: ...
    @property
    def is_divided_up(self) -> bool:
        """Whether partitions have all processors."""

def pass_gate() -> None:
    """Wait as operators do, if the thread is in a context that yields."""

def context_of(address: int) -> Context | None:
    """Find the context that memory belongs to, a destroyed one as well."""

def current_context() -> Context | None: ...
def install_cpu_allocator() -> None: ...
def uninstall_cpu_allocator() -> None: ...
def guard_forks(manager: Manager) -> None: ...
def format_bytes(bytes: int) -> str: ...

# Only in builds for a CUDA torch.
def cuda_streams(device: CudaDevice) -> ThreadStreams: ...
def cuda_allocator() -> Any: ...
def cuda_is_initialized() -> bool: ...
def install_cuda_allocator() -> None: ...
def uninstall_cuda_allocator() -> None: ...
def serve_contexts_of(manager: Manager) -> None: ...
def drop_workspaces_of(context: Context) -> None: ...
def workspace_bytes_of(id: int) -> int: ...

class Capture:
    """A capture that torch has announced; abandoned when it goes, unless it was finished."""

    @staticmethod
    def take_announced() -> Capture | None:
        """Return the one that the calling thread began last, once."""

    @property
    def goes_on(self) -> bool: ...
    def finish(self) -> None: ...
    def abandon(self) -> None:
        """End it, and release its pool, instead of its graph."""

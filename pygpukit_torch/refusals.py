"""What is known of a :class:`torch.OutOfMemoryError` that a context raised."""

from dataclasses import dataclass

import torch

from pygpukit_torch import native
from pygpukit_torch.qos import QoSPolicy

__all__ = ["Holder", "Refusal", "refusal_of"]


@dataclass(frozen=True)
class Holder:
    """A context that held memory of the device then. Sizes in bytes."""

    name: str
    qos: QoSPolicy
    used: int
    reserved: int
    evicted: int
    base: int
    in_use: bool
    pinned: bool
    destroyed: bool


@dataclass(frozen=True)
class Refusal:
    """Why a request of a context could not be served. Sizes in bytes.

    ``requested`` is the size of the tensor, or, where an evicted context could not come back, of
    what is in host memory. ``available`` is what the context could have had, in smaller pieces.
    ``holders`` are the ten that held most, the largest first, and ``others`` is how many more
    there were.
    """

    context: str
    qos: QoSPolicy
    requested: int
    used: int
    budget: int
    available: int
    reason: str
    holders: tuple[Holder, ...]
    others: int


def refusal_of(error: BaseException) -> Refusal | None:
    """Return the facts of an out-of-memory error of a context; None for any other error.

    Torch makes its errors of text alone, so the facts are found by it: those of the latest 256, and
    of equal texts the latest. (On CUDA sizes are rounded in them.)
    """
    is_known = isinstance(error, torch.OutOfMemoryError | RuntimeError)
    found = native.find_refusal(str(error).encode(errors="replace")) if is_known else None
    if found is None:
        return None
    return Refusal(
        context=found.context,
        qos=QoSPolicy(found.tier.name),
        requested=found.requested,
        used=found.used,
        budget=found.budget,
        available=found.available,
        reason=found.reason,
        holders=tuple(
            Holder(
                name=holder.name,
                qos=QoSPolicy(holder.tier.name),
                used=holder.used,
                reserved=holder.resident,
                evicted=holder.evicted,
                base=holder.base,
                in_use=holder.in_use,
                pinned=holder.pinned,
                destroyed=holder.orphan,
            )
            for holder in found.holders
        ),
        others=found.others,
    )

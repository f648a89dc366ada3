"""Several PyTorch models on one device, each inside its own memory budget, tier and stream."""

import os

from pygpukit_torch import _build_check

# How many hardware queues the streams of a process share, which the driver reads when it is first
# used: with its default of 8, streams of different contexts wait for each other, and fewer of them
# can be stopped while memory moves. Whoever has set it keeps what was set.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

_build_check.check_this_build()

from pygpukit_torch import errors, native, scheduler  # noqa: E402
from pygpukit_torch.errors import *  # noqa: E402, F403
from pygpukit_torch.recording import record  # noqa: E402
from pygpukit_torch.scheduler import *  # noqa: E402, F403
from pygpukit_torch.trace import Trace  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Trace",
    "errors",
    "native",
    "record",
    "scheduler",
    *errors.__all__,
    *scheduler.__all__,
]

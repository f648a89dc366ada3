"""Several PyTorch models on one device, each inside its own memory budget, tier and stream."""

from pygpukit_torch import _build_check, _hardware_queues

_hardware_queues.ask_for_more()
_build_check.check_this_build()

from pygpukit_torch import errors, native, refusals, scheduler  # noqa: E402
from pygpukit_torch.errors import *  # noqa: E402, F403
from pygpukit_torch.recording import record  # noqa: E402
from pygpukit_torch.refusals import *  # noqa: E402, F403
from pygpukit_torch.scheduler import *  # noqa: E402, F403
from pygpukit_torch.sharing import share  # noqa: E402
from pygpukit_torch.trace import Trace  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Trace",
    "errors",
    "native",
    "record",
    "scheduler",
    "share",
    *errors.__all__,
    *refusals.__all__,
    *scheduler.__all__,
]

"""Quality-of-service tiers."""

import enum

from pygpukit_torch import native


class QoSPolicy(enum.Enum):
    """How a context's memory is protected against other contexts."""

    GUARANTEED = "guaranteed"
    """All of ``max_vram`` is reserved, physically, from creation on."""

    BURSTABLE = "burstable"
    """``base_vram`` is reserved; beyond it the context takes what is free, up to ``max_vram``."""

    BEST_EFFORT = "best_effort"
    """Nothing is reserved; the context takes what is free, up to ``max_vram``."""

    @property
    def tier(self) -> native.Tier:
        """The native module's name for it."""
        return native.Tier.__members__[self.value]

"""The errors of the package: one tree.

An allocation that cannot be had is not among them: it raises :class:`torch.OutOfMemoryError`, so
that code written for torch keeps working. Bad arguments raise ``ValueError`` or ``TypeError``.
"""

__all__ = [
    "AdmissionError",
    "ContextBusyError",
    "ContextDestroyedError",
    "ContextNotFoundError",
    "DeviceError",
    "ForkError",
    "InitializationError",
    "InvariantError",
    "PyGPUKitError",
    "SessionError",
    "SessionTimeoutError",
]


class PyGPUKitError(Exception):
    """Base of everything that this package raises of its own."""


class InitializationError(PyGPUKitError, RuntimeError):
    """The device cannot be initialized as asked, or already is in another way."""


class AdmissionError(PyGPUKitError):
    """A reservation does not fit beside those already made; the message has the figures.

    Of a ``QosPolicyEvaluator``: an evaluation no longer holds.
    """


class ContextNotFoundError(PyGPUKitError, KeyError):
    """No context has this name."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would put the sentence in quotes.
        return str(self.args[0]) if self.args else ""


class ContextDestroyedError(PyGPUKitError, RuntimeError):
    """The context has been destroyed."""


class ContextBusyError(PyGPUKitError, RuntimeError):
    """The context has open sessions, or contexts live that must be destroyed first."""


class SessionError(PyGPUKitError, RuntimeError):
    """A session was entered or left where it cannot be; the message says why."""


class SessionTimeoutError(SessionError, TimeoutError):
    """A session did not get its turn in time; the message has the limit, and who is before it."""


class ForkError(PyGPUKitError, RuntimeError):
    """A forked child used the device of its parent."""


class DeviceError(PyGPUKitError, RuntimeError):
    """A call to the device failed; the books are right, and the operation can be tried again."""


class InvariantError(PyGPUKitError, AssertionError):
    """A check of the internal books failed: a bug in this package."""

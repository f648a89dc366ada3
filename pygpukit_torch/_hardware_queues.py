"""How many hardware queues the streams of a process share.

With the CUDA driver's default of 8, streams of different contexts wait for each other, and few of
them can be stopped while memory moves. The driver reads the variable when it is first used.
"""

import ctypes
import os

_VARIABLE, _MOST = "CUDA_DEVICE_MAX_CONNECTIONS", "32"
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


def ask_for_more() -> None:
    """Ask for as many as there can be, unless the variable is set or comes too late."""
    if _VARIABLE in os.environ:
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        answer = driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    except (OSError, AttributeError):
        return
    if answer == _NOT_INITIALIZED:
        os.environ[_VARIABLE] = _MOST

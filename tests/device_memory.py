"""Reading and writing device memory in tests, on any device."""

import ctypes

from pygpukit_torch.native import Device


class DeviceMemory:
    """Reads and writes through the device's own copies."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream = device.create_stream()

    def write(self, address: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        self.device.copy(address, ctypes.addressof(buffer), len(data), self.stream)
        self.device.synchronize_stream(self.stream)

    def read(self, address: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        self.device.copy(ctypes.addressof(buffer), address, size, self.stream)
        self.device.synchronize_stream(self.stream)
        return buffer.raw

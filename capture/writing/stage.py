"""Moving tensors off the device without making it wait."""

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Staged:
    """Tensors on their way to the host.

    Attributes:
        tensors: host tensors by name, valid after `wait`.
        n_bytes: host memory they take.
    """

    tensors: dict[str, Tensor]
    n_bytes: int
    _event: "torch.cuda.Event | None" = None
    _buffers: list[Tensor] = field(default_factory=list)
    _pool: "PinnedPool | None" = None

    @property
    def pinned(self) -> bool:
        """Whether the host tensors lie in buffers that are used again after `release`."""
        return self._pool is not None

    def wait(self) -> dict[str, Tensor]:
        """Block until the copies are done; return the host tensors."""
        if self._event is not None:
            self._event.synchronize()
        return self.tensors

    def release(self) -> None:
        """Give the pinned buffers back; the tensors must not be read any more."""
        self.tensors = {}
        if self._pool is not None:
            self._pool.give_back(self._buffers)
        self._buffers = []


class PinnedPool:
    """Pinned host buffers of power-of-two sizes, reused: pinning memory is slow."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> Tensor:
        """(size,) uint8 pinned buffer of at least n_bytes."""
        size = max(4096, 1 << (n_bytes - 1).bit_length())
        with self._lock:
            free = self._free.get(size)
            if free:
                return free.pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def give_back(self, buffers: list[Tensor]) -> None:
        with self._lock:
            for buffer in buffers:
                self._free.setdefault(buffer.numel(), []).append(buffer)


_pool = PinnedPool()  # of the process: a run finds the buffers of the one before


class Stage:
    """Copies tensors to the host: on CUDA asynchronously, on a stream of its own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, tensors: dict[str, Tensor]) -> Staged:
        """Start copying; nothing waits. Host tensors are handed on as they are.

        Args:
            tensors: by name, all on the host or all on one CUDA device. The caller gives them up:
                they must not be written to afterwards.
        """
        n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        if device is None:
            return Staged({name: t.cpu() for name, t in tensors.items()}, n_bytes)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        hosts, buffers = {}, []
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                tensor = tensor.contiguous()
                buffer = _pool.take(max(1, tensor.numel() * tensor.element_size()))
                host = buffer[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
                host = host.view(tensor.shape)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
                hosts[name] = host
                buffers.append(buffer)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return Staged(hosts, n_bytes, event, buffers, _pool)

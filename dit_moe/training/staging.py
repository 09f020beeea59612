"""Tensors in the host's memory, updated on a GPU: a piece at a time, while other pieces are copied there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from dit_moe_kernels import AVERAGE_PIECE
from torch import Tensor

SLOT_BYTES = 64 * 2**20  # of pinned memory, and as much on the GPU, for each piece under way
_SLOTS = 4


class Piece(NamedTuple):
    """Neighbouring elements of one of the tensors, and the elements of its source that belong to them.

    tensor: (n,), contiguous, on the host.
    source: (n,) on the device.
    number: the tensor's place among all.
    start: the first element's place in the tensor.
    """

    tensor: Tensor
    source: Tensor
    number: int
    start: int


def update_staged(
    tensors: Sequence[Tensor],
    sources: Sequence[Tensor],
    update: Callable[[Tensor, Piece], object],
    slot_bytes: int = SLOT_BYTES,
) -> None:
    """Update tensors of the host on the device of their sources, and wait until it is done.

    Four pieces are under way at a time, each in a pinned buffer of its own: the host copies one in and one out while
    the device copies and updates others. Pinned are the buffers alone, whatever the size of the tensors.

    Args:
        tensors: contiguous, of one dtype, on the host; changed in place.
        sources: of the same shapes, on one device, not changed meanwhile.
        update: called with a copy of a piece on the device, to be changed there, and the piece, in order.
        slot_bytes: size of a buffer, a multiple of AVERAGE_PIECE elements.

    Raises:
        ValueError: a tensor that is not contiguous, or slot_bytes that is no such multiple.
    """
    device, dtype = sources[0].device, tensors[0].dtype
    if slot_bytes < 1 or slot_bytes % (AVERAGE_PIECE * dtype.itemsize):
        raise ValueError(f"slot_bytes: got {slot_bytes}, expected a multiple of {AVERAGE_PIECE * dtype.itemsize}")
    largest = max(tensor.numel() for tensor in tensors)
    slots = [_Slot(min(slot_bytes // dtype.itemsize, largest), dtype, device) for _ in range(_SLOTS)]
    runtime = torch.get_device_module(device)  # on the CPU its streams and events do nothing
    with torch.cuda.device_of(sources[0]):
        stream = runtime.Stream()
        stream.wait_stream(runtime.current_stream())
        try:
            with runtime.stream(stream):
                for place, piece in enumerate(_pieces(tensors, sources, slot_bytes // dtype.itemsize)):
                    slots[place % _SLOTS].take_back()
                    slots[place % _SLOTS].send(piece, update)
                for slot in slots:
                    slot.take_back()
        finally:  # also if the update was stopped: nothing may be under way when the buffers go
            end = runtime.Event()
            end.record(stream)
            end.synchronize()


class _Slot:
    """A piece's buffers on both sides."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.empty(elements, dtype=dtype, pin_memory=device.type == "cuda")
        self._device = torch.empty(elements, dtype=dtype, device=device)
        self._runtime = torch.get_device_module(device)
        self._event = self._runtime.Event()
        self._piece: Piece | None = None

    def send(self, piece: Piece, update: Callable[[Tensor, Piece], object]) -> None:
        """Queue a piece's way to the device, its update and the way back, on the current stream."""
        count = piece.tensor.numel()
        here, there = self._host[:count], self._device[:count]
        here.copy_(piece.tensor)
        there.copy_(here, non_blocking=True)
        update(there, piece)
        here.copy_(there, non_blocking=True)
        self._event.record(self._runtime.current_stream())
        self._piece = piece

    def take_back(self) -> None:
        """Wait for the piece under way, if there is one, and put it into its tensor."""
        if self._piece is not None:
            self._event.synchronize()
            self._piece.tensor.copy_(self._host[: self._piece.tensor.numel()])
            self._piece = None


def _pieces(tensors: Iterable[Tensor], sources: Iterable[Tensor], elements: int) -> Iterator[Piece]:
    for number, (tensor, source) in enumerate(zip(tensors, sources, strict=True)):
        if not tensor.is_contiguous():
            raise ValueError(f"tensor {number}: got strides {tensor.stride()}, expected a contiguous tensor")
        parts = zip(tensor.view(-1).split(elements), source.reshape(-1).split(elements), strict=True)
        for place, (part, of_source) in enumerate(parts):
            if part.numel():
                yield Piece(part, of_source, number, place * elements)

"""Whether bytes of KV are those that were written.

A CRC-32 of the bytes where they lie in host memory (zlib: above 1 GB/s a core). On a GPU that would bring all of the KV to the
host: there it is a sum over 32-bit words, each times its place, modulo 2^64. It is exact whatever the order of addition, and
unlike a plain sum it sees words that have changed places.
"""

import zlib

import torch

_PRIME = 0x9E3779B1


def checksum_of(piece: torch.Tensor, before: int = 0) -> int:
    """Of a contiguous tensor's bytes and, by `before`, of the pieces before it."""
    flat = bytes_of(piece).flatten()
    if piece.device.type == "cpu":
        return zlib.crc32(flat.numpy().data, before)
    padding = -flat.numel() % 4
    words = torch.nn.functional.pad(flat, (0, padding)).view(torch.int32)
    places = torch.arange(1, words.numel() + 1, device=piece.device)
    total = int((words * places).sum().item()) + before * _PRIME
    return (total + 2**63) % 2**64 - 2**63


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as one row of bytes, a view."""
    return tensor.view(-1).view(torch.uint8).unsqueeze(0)

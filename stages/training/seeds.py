"""Seeds for everything random in training, each from the names of what it is for."""

import hashlib


def stream_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable: streams of different names never share random numbers."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big") >> 1

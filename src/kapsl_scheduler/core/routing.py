"""Which engine a session belongs to. Pure: the candidates are an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

__all__ = ["rendezvous"]


def rendezvous(key: str, candidates: Sequence[int]) -> int:
    """The candidate with the highest hash of (key, candidate): when one leaves, only its own keys move.

    Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998).
    """
    text = key.encode()
    return max(candidates, key=lambda candidate: hashlib.blake2b(text + b"\0%d" % candidate, digest_size=8).digest())

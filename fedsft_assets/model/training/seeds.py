"""Seeds that follow from words, the same on every machine."""

import hashlib


def seed_of(words: str) -> int:
    """A seed for torch's and Python's generators: 63 bits of the words' SHA-256."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1

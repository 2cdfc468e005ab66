"""Seeds that differ for different purposes, so that nothing is drawn alike by accident."""

import zlib

import numpy as np


def derive(seed: int, *purpose: str) -> int:
    """A seed for one purpose of a run, a pure function of both: derive(0, "teacher", "data") is nobody else's."""
    words = [zlib.crc32(word.encode()) for word in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])

"""Randomness as a pure function of what it is for.

No random-number state is ever saved or restored. Whoever needs random numbers first seeds the generators with a hash of
the facts that identify the need: (seed, epoch, index) for the augmentation of one image, (seed, rank, step) for what a
training step draws (mixup, erasing, stochastic depth). A run that was killed therefore continues with the numbers it
would have drawn, whatever the number of loader workers and wherever in the epoch it stopped.
"""

from __future__ import annotations

import numpy as np
from timm.utils import random_seed


def derive(*facts: int) -> int:
    """A 32-bit seed from non-negative integers; different tuples give unrelated seeds."""
    return int(np.random.SeedSequence(facts).generate_state(1)[0])


def reseed(*facts: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators (all devices) from `facts`."""
    random_seed(derive(*facts))

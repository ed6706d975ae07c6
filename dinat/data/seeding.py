"""Randomness as a pure function of what it is for.

No random-number state is ever saved or restored. Whoever needs random numbers first seeds the generators with a hash of
the facts that identify the need: (seed, epoch, index) for the augmentation of one image, (seed, rank, step) for what a
training step draws (mixup, erasing, stochastic depth). A run that was killed therefore continues with the numbers it
would have drawn, whatever the number of loader workers and wherever in the epoch it stopped.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def derive(*facts: int) -> int:
    """A 32-bit seed from non-negative integers; different tuples give unrelated seeds."""
    # their number is one of them: SeedSequence takes (7,) and (7, 0) for the same
    return int(np.random.SeedSequence([len(facts), *facts]).generate_state(1)[0])


def reseed(*facts: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators, those of all devices included."""
    seed = reseed_host(*facts)
    torch.manual_seed(seed)


def reseed_host(*facts: int) -> int:
    """Seeds the generators that work on the CPU, and returns the seed.

    For each image, where `torch.manual_seed` would cost a millisecond: it prepares a stack trace for every accelerator.
    """
    seed = derive(*facts)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(seed)
    return seed

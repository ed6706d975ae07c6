"""What the models see: the weights of every head, what heads do over depth, and what reaches a token from where.

All of it works for the models of this package and for those that hold one, such as dense models. `dinat inspect` is the
same on the command line; docs/inspect.md shows both.
"""

from .extraction import Attention, Block, attention, blocks, write_npz

__all__ = ["Attention", "Block", "attention", "blocks", "write_npz"]

"""What the models see: the weights of every head, what heads do over depth, and what reaches a token from where.

All of it works for the models of this package and for those that hold one, such as dense models. `dinat inspect` is the
same on the command line; docs/inspect.md shows both.
"""

from .cam import grad_cam
from .erf import Square, effective_fields, logarithm, squares
from .extraction import Attention, Block, attention, blocks, write_npz
from .field import Field, receptive_fields
from .heads import Head, describe_heads
from .page import write_page

__all__ = [
    "Attention",
    "Block",
    "Field",
    "Head",
    "Square",
    "attention",
    "blocks",
    "describe_heads",
    "effective_fields",
    "grad_cam",
    "logarithm",
    "receptive_fields",
    "squares",
    "write_npz",
    "write_page",
]

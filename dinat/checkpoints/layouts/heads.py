"""Heads and necks of other layouts, brought to our names by the rows of `mm.py` and `detectron2.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from dinat.errors import CheckpointError

# a pattern of the whole key, and its name here; or one name for each of the equal parts that the tensor is cut into
Row = tuple[str, str | tuple[str, ...]]


def rename_heads(state: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """`state` under the names of the first row whose pattern is the key.

    Raises:
        CheckpointError: keys that no row is for.
    """
    out, unknown = {}, []
    for key, value in state.items():
        found = ((match, names) for pattern, names in rows if (match := re.fullmatch(pattern, key)))
        match, names = next(found, (None, ()))
        if match is None:
            unknown.append(key)
        elif isinstance(names, str):
            out[match.expand(names)] = value
        else:
            out |= {match.expand(n): x.clone() for n, x in zip(names, value.chunk(len(names)), strict=True)}
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys of the checkpoint belong to no known part: {sorted(unknown)[:3]}.")
    return out

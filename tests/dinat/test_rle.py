"""Run-length encodings against pycocotools, and what is said where the library is missing."""

import sys

import numpy as np
import pytest
import torch

from dinat import rle
from dinat.errors import UserError


@pytest.fixture
def masks():
    return torch.rand(5, 9, 14, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 5)[:, None, None]


def test_encodings_are_those_of_pycocotools(masks):
    theirs = pytest.importorskip("pycocotools.mask")
    encoded = rle.encode(masks)
    columns = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
    assert encoded == [{**one, "counts": one["counts"].decode()} for one in theirs.encode(columns)]
    for mask, one in zip(masks, encoded, strict=True):
        assert np.array_equal(rle.decode(one, 9, 14), mask)
    assert rle.encode(masks[:0]) == []


def test_polygons_and_counts_are_decoded_as_by_pycocotools():
    theirs = pytest.importorskip("pycocotools.mask")
    polygons = [[1.0, 1, 12.5, 2, 6, 8.2], [0.0, 5, 3, 5, 3, 9, 0, 9]]
    expected = theirs.decode(theirs.merge(theirs.frPyObjects(polygons, 9, 14))).astype(bool)
    assert np.array_equal(rle.decode(polygons, 9, 14), expected)
    counts = {"size": [9, 14], "counts": [9, 3, 114]}  # three pixels of the second column
    assert np.argwhere(rle.decode(counts, 9, 14)).tolist() == [[0, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [4, 5], "counts": [20]}, "its mask has 5 x 4 pixels, the image 14 x 9"),
        ({"size": [9, 14], "counts": [20]}, "decoded 20 pixels but expected 126"),
        ({"size": [9, 14], "counts": [20, 500]}, "exceed the mask dimensions"),
        ({"size": [9, 14], "counts": "@@@@#"}, "its mask is damaged: "),
    ],
)
def test_damaged_encodings(segmentation, message):
    with pytest.raises(ValueError, match=message):
        rle.decode(segmentation, 9, 14)


def test_a_missing_library_is_named(monkeypatch, masks):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r'not installed here: pip install "dinat\[dense\]"'):
        rle.encode(masks)

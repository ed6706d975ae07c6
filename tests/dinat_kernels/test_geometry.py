"""The window arithmetic against the definition's worked examples, and its errors."""

from collections import deque

import numpy as np
import pytest
from dinat_kernels.geometry import (
    Neighborhood,
    check_fits,
    group_length,
    make_neighborhood,
    seeing_range,
    visible_pairs,
    visible_range,
)
from omegaconf import ListConfig


def visible_keys(length: int, k: int, s: int, d: int, causal: bool) -> list[list[int]]:
    """Visible keys of every query of an axis."""
    keys = [[] for _ in range(length)]
    for group in range(d):
        n = group_length(length, d, group)
        start, end = visible_range(np.arange(n), n, k, s, causal)
        for position in range(n):
            keys[position * d + group] = [p * d + group for p in range(start[position], end[position])]
    return keys


def span(*ranges: tuple[int, int]) -> list[list[int]]:
    return [list(range(a, b + 1)) for a, b in ranges]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((8, 3, 1, 1, False), span((0, 2), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (5, 7))),
        ((8, 4, 1, 1, False), span((0, 3), (0, 3), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (4, 7))),
        ((8, 4, 1, 1, True), span((0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7))),
        (
            (10, 4, 2, 1, False),
            span((0, 3), (0, 3), (1, 4), (1, 4), (3, 6), (3, 6), (5, 8), (5, 8), (6, 9), (6, 9)),
        ),
        ((9, 5, 5, 1, False), span(*[(0, 4)] * 5, *[(4, 8)] * 4)),
        (
            (10, 4, 3, 1, True),
            span((0, 0), (0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (5, 6), (5, 7), (5, 8), (6, 9)),
        ),
        (
            (11, 3, 1, 3, False),
            [
                [0, 3, 6],
                [1, 4, 7],
                [2, 5, 8],
                [0, 3, 6],
                [1, 4, 7],
                [2, 5, 8],
                [3, 6, 9],
                [4, 7, 10],
                [2, 5, 8],
                [3, 6, 9],
                [4, 7, 10],
            ],
        ),
    ],
)
def test_visible_keys_match_the_definition(arguments, expected):
    assert visible_keys(*arguments) == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "k", "s", "d"), [(17, 4, 3, 2), (9, 3, 2, 3), (12, 5, 5, 2), (7, 1, 1, 7)])
def test_visible_pairs_counts_them(length, k, s, d, causal):
    window = make_neighborhood(1, k, d, s, causal)
    assert visible_pairs(window, (length,)) == sum(map(len, visible_keys(length, k, s, d, causal)))


def test_arguments_are_expanded_to_every_axis():
    window = make_neighborhood(2, 7, (1, 2), 1, (False, True))
    assert window == Neighborhood((7, 7), (1, 2), (1, 1), (False, True))


def test_arguments_of_any_sequence_and_integer_type():
    expected = make_neighborhood(2, (7, 5), (1, 2), 3, (False, True))
    given = ListConfig([7, 5]), deque([1, 2]), np.int32(3), (np.bool_(False), 1)
    window = make_neighborhood(2, *given)
    assert window == expected
    assert {type(x) for axes in window[:3] for x in axes} == {int}
    assert {type(x) for x in window.is_causal} == {bool}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kernel_size="33"), "kernel_size must be one int or 2 of them .* got '33'"),
        (dict(kernel_size=(3, 3, 3)), r"kernel_size must be one int or 2 of them .* \(3, 3, 3\)"),
        (dict(kernel_size=3.0), "kernel_size must be one int or 2"),
        (dict(kernel_size=0), "kernel_size must be at least 1, got 0 on axis 0"),
        (dict(kernel_size=3, dilation=(1, 0)), "dilation must be at least 1, got 0 on axis 1"),
        (dict(kernel_size=3, stride=4), r"stride must lie in 1\.\.kernel_size, got stride 4 with kernel_size 3"),
    ],
)
def test_bad_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_neighborhood(2, **arguments)


def test_a_window_that_does_not_fit_names_axis_and_numbers():
    with pytest.raises(ValueError, match=r"kernel_size 7 \* dilation 3 = 21 > length 20 on axis 1"):
        check_fits(make_neighborhood(2, 7, 3), (21, 20))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", range(1, 20))
def test_seeing_range_is_the_inverse(n, causal):
    position = np.arange(n)
    for k in range(1, n + 1):
        for s in range(1, k + 1):
            start, end = visible_range(position, n, k, s, causal)
            sees = (start[:, None] <= position) & (position < end[:, None])  # (queries, keys)
            first, last = seeing_range(position, n, k, s, causal)
            assert np.array_equal(sees, (first <= position[:, None]) & (position[:, None] < last)), (k, s)
            assert (np.diff(first) >= 0).all()
            assert (np.diff(last) >= 0).all()

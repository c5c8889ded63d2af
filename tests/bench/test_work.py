"""The bench notices a wrong result and reads shapes as people write them."""

import numpy as np
import pytest

from bench.work import Shape, operands, worst_error
from bench.worker import TOLERANCE


@pytest.mark.parametrize(
    ("text", "shape", "label"),
    [
        ("256", Shape(256, 256, 256), "256³"),
        ("16384x1024x512", Shape(16384, 1024, 512), "16384x1024x512"),
    ],
)
def test_a_shape_reads_as_it_is_written(text, shape, label):
    assert Shape.parse(text) == shape
    assert shape.label == label
    assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "12x3", "0", "1x2x3x4", "4x-1x4", "big"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ValueError, match=r"shape|invalid literal"):
        Shape.parse(text)


def test_operations_and_bytes_are_those_of_three_products():
    shape = Shape(2, 3, 5)
    assert shape.operations == 3 * 2 * (2 * 3 * 5)
    assert shape.bytes_each_way == 4 * (6 + 15 + 10)


def test_every_process_gets_the_same_operands():
    shape = Shape(3, 4, 5)
    for first, second in zip(operands(shape), operands(shape), strict=True):
        np.testing.assert_array_equal(first, second)


def test_right_results_pass_and_each_wrong_one_is_noticed():
    x, w, dy = operands(Shape(40, 30, 30))
    right = (x @ w, dy @ w.T, x.T @ dy)
    assert worst_error((x, w, dy), right) < TOLERANCE
    for wrong in (
        (right[0] * 1.001, right[1], right[2]),
        (right[0], dy @ w, right[2]),
        (right[0], right[1], right[2].T),
        (right[0], right[1], right[2][:-1]),
    ):
        assert worst_error((x, w, dy), wrong) > TOLERANCE

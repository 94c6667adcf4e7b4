"""Spreading work over Ray gives the numbers that this process gives, in the same order."""

from collections.abc import Iterator

import numpy as np
import pytest
from torch import nn

from support.clusters import cluster
from trilobe.algorithms.fit import predict_logits
from trilobe.algorithms.spread import map_on_ray
from trilobe.rows import as_rows


@pytest.fixture(scope="module", autouse=True)
def connected() -> Iterator[None]:
    with cluster():
        yield


@pytest.mark.filterwarnings("ignore")
def test_the_same_numbers_in_the_same_order() -> None:
    net, X = nn.Linear(5, 3), np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32)
    pieces = map_on_ray(predict_logits, net, X, at_once=64)
    assert [len(p) for p in pieces] == [64] * 15 + [40]
    np.testing.assert_array_equal(
        np.concatenate(pieces), np.concatenate([predict_logits(net, X[i : i + 64]) for i in range(0, 1000, 64)])
    )


@pytest.mark.filterwarnings("ignore")
def test_rows_of_unequal_length() -> None:
    X = as_rows([np.ones((t, 4), dtype=np.float32) for t in (1, 5, 2, 2, 9)])
    pieces = map_on_ray(predict_logits, nn.Linear(4, 2), X, at_once=2)
    assert [row.shape for piece in pieces for row in piece] == [(t, 2) for t in (1, 5, 2, 2, 9)]


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_a_worker_arrives() -> None:
    with pytest.raises(Exception, match="does not take an input of shape"):
        map_on_ray(predict_logits, nn.Linear(4, 2), np.ones((10, 3), dtype=np.float32))

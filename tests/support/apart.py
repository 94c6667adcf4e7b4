"""Steps that are run in processes of their own, some of which do bad things to them."""

import ctypes
import os
import time

import numpy as np
from numpy.typing import NDArray

from trilobe.errors import DataError
from trilobe.infrastructure.serve import function

Array = NDArray[np.float32]
X, Y = {"x": "FP32[-1]"}, {"y": "FP32[-1]"}
kept: list[bytes] = []


@function(X, Y)
def double(x: Array) -> dict[str, Array]:
    return {"y": 2 * x}


@function({"x": "FP32[-1]"}, {"y": "INT64[-1]"})
def pid(x: Array) -> dict[str, NDArray[np.int64]]:
    return {"y": np.full(len(x), os.getpid())}


@function({"x": "FP32[-1]"}, {"y": "INT64[-1]"})
def slow_pid(x: Array) -> dict[str, NDArray[np.int64]]:
    time.sleep(0.3)
    return {"y": np.full(len(x), os.getpid())}


@function({"x": "FP32[-1]"}, {"y": "INT64[-1]"})
def leak(x: Array) -> dict[str, NDArray[np.int64]]:
    kept.append(b"x" * (100 << 20))
    return {"y": np.full(len(x), os.getpid())}


@function(X, Y)
def forever(x: Array) -> dict[str, Array]:
    while True:
        pass


@function(X, Y)
def odd(x: Array) -> dict[str, Array]:
    match int(x.max()):
        case 1:
            raise DataError("one is not liked", expected="another")
        case 2:
            raise ZeroDivisionError("division by zero")
        case 3:
            return {"y": np.zeros((2, 2), np.float32)}
        case 4:
            os._exit(7)
        case 5:
            ctypes.string_at(0)
        case 6:
            time.sleep(60)
    return {"y": x}


@function(
    {"f": "FP32[-1,-1]", "i": "INT64[-1]", "b": "BOOL[-1,2]", "s": "BYTES[-1]"},
    {"f_": "FP32[-1,-1]", "i_": "INT64[-1]", "b_": "BOOL[-1,2]", "s_": "BYTES[-1]"},
)
def everything(f: Array, i: Array, b: Array, s: Array) -> dict[str, Array]:
    return {"f_": f, "i_": i, "b_": b, "s_": s}

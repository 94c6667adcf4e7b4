"""Weights come back as they were, the same ones give the same bytes, and damaged ones are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as reference_load
from torch import Tensor, nn

from trilobe.algorithms.weights import from_safetensors, load_into, to_safetensors
from trilobe.errors import TrainingError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


@st.composite
def tensor_maps(draw: st.DrawFn) -> dict[str, Tensor]:
    made = {}
    for name in draw(
        st.lists(
            st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=8),
            max_size=4,
            unique=True,
        )
    ):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        made[name] = (torch.randn(shape, generator=rng) * 50).to(draw(st.sampled_from(DTYPES)))
    made.pop("__metadata__", None)
    return made


metas = st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=5)


@settings(max_examples=60, deadline=None)
@given(tensor_maps(), metas)
def test_round_trip(tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    data = to_safetensors(tensors, meta)
    back, meta_back = from_safetensors(data)
    assert meta_back == meta and back.keys() == tensors.keys() == reference_load(data).keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name], t)
    assert to_safetensors(dict(reversed(tensors.items())), dict(reversed(meta.items()))) == data, "the same bytes"


def test_tensors_that_are_views_need_gradients_or_share_memory() -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {"t": whole.T, "a": whole[0], "b": whole[0], "g": nn.Parameter(whole)}
    back, _ = from_safetensors(to_safetensors(tensors))
    assert all(torch.equal(back[k], v) for k, v in tensors.items())
    back["a"][0] = 99
    assert back["b"][0] == 0 and whole[0, 0] == 0


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 30, -200, -1])
def test_truncated_bytes(cut: int) -> None:
    data = to_safetensors(nn.Linear(9, 9).state_dict(), {"made": "here"})
    with pytest.raises(TrainingError, match=r"these weights cannot be read: .*; expected a whole safetensors file"):
        from_safetensors(data[:cut])
    with pytest.raises(TrainingError):
        load_into(nn.Linear(9, 9), data[:cut])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 119), st.integers(0, 255))
def test_any_damaged_header_is_refused_or_harmless(at: int, byte: int) -> None:
    data = bytearray(to_safetensors({"w": torch.ones(3), "b": torch.zeros(2)}, {"k": "v"}))
    data[at % (len(data) - 20)] = byte
    try:
        tensors, meta = from_safetensors(bytes(data))
    except TrainingError:
        return
    assert all(isinstance(t, Tensor) for t in tensors.values()) and isinstance(meta, dict)


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(TrainingError):
        from_safetensors(to_safetensors({"w": torch.ones(3)}) + b"more")


def test_load_into_leaves_the_network_ready() -> None:
    source, target = nn.Sequential(nn.Linear(3, 2), nn.Dropout()), nn.Sequential(nn.Linear(3, 2), nn.Dropout()).train()
    assert load_into(target, to_safetensors(source.state_dict())) is target and not target.training
    x = torch.from_numpy(np.random.default_rng(0).random((4, 3), dtype=np.float32))
    assert torch.equal(target(x), source.eval()(x))


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (nn.Sequential(nn.Linear(3, 4)), "0.weight"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), "1.weight"),
        (nn.Sequential(nn.Linear(3, 2, bias=False)), "0.bias"),
        (nn.Linear(3, 2), "weight"),
    ],
)
def test_weights_of_another_network_are_named(other: nn.Module, names: str) -> None:
    data = to_safetensors(nn.Sequential(nn.Linear(3, 2)).state_dict())
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(TrainingError, match="(?s)the weights do not fit the network.*" + names):
        load_into(other, data)
    assert len(before) == len(list(other.parameters()))

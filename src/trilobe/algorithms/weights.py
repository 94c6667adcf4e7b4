"""Weights as bytes: safetensors in and out, never pickle."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trilobe.errors import TrainingError


def to_safetensors(tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> bytes:
    """Tensors by name as one safetensors file; the same tensors and metadata give the same bytes.

    >>> import torch
    >>> from_safetensors(to_safetensors({"w": torch.ones(2)}, {"made": "here"}))
    ({'w': tensor([1., 1.])}, {'made': 'here'})
    """
    from safetensors.torch import save

    data = save(
        {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, dict(meta) if meta else None
    )
    header, at = _header(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()  # the library orders metadata at random
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[at:]


def from_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the metadata. Raises :class:`~trilobe.errors.TrainingError` for damaged bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as e:
        raise TrainingError(f"these weights cannot be read: {e}", expected="a whole safetensors file") from e
    return tensors, _header(data)[0].get("__metadata__", {})


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON that opens a safetensors file, and where the tensors begin."""
    at = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:at]), at


def load_into(module: nn.Module, data: bytes) -> nn.Module:
    """Put the weights into ``module`` and leave it in eval mode.

    Raises:
        TrainingError: names or shapes do not match, saying which.

    >>> import torch
    >>> net = nn.Linear(1, 1)
    >>> load_into(net, to_safetensors(net.state_dict())) is net
    True
    """
    tensors, _ = from_safetensors(data)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as e:
        raise TrainingError(
            f"the weights do not fit the network: {e}", expected="the network they were trained in"
        ) from e
    return module.eval()

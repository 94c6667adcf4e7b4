"""Weights as bytes: safetensors in and out, never pickle."""

from collections.abc import Mapping

from torch import Tensor, nn

from trilobe.errors import TrainingError


def to_safetensors(tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> bytes:
    """Tensors by name as one safetensors file; the same tensors give the same bytes.

    >>> import torch
    >>> from_safetensors(to_safetensors({"w": torch.ones(2)}, {"made": "here"}))
    ({'w': tensor([1., 1.])}, {'made': 'here'})
    """
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous().clone() for name, t in sorted(tensors.items())}, dict(meta or {}))


def from_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the metadata. Raises :class:`~trilobe.errors.TrainingError` for damaged bytes."""
    import json

    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as e:
        raise TrainingError(f"these weights cannot be read: {e}", expected="a whole safetensors file") from e
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


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

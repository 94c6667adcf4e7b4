"""What a module says of examples, in eval mode or with dropout left on."""

import numpy as np
import torch
from torch import nn

from trilobe.algorithms.fit.batches import as_tensor
from trilobe.algorithms.fit.training import logits_of
from trilobe.rows import as_rows, is_ragged, lengths, pad
from trilobe.types import FloatArray


def predict_logits(module: nn.Module, X: FloatArray, batch_size: int = 1024) -> FloatArray:
    """Logits of ``X`` ``(n, ...)`` in eval mode, ``(n, n_classes)`` float32 (any shape the module gives).

    For rows of unequal length those of each token are rows too, ``(T_i, n_classes)``; batches are then of texts of
    about one length.

    >>> predict_logits(nn.Linear(2, 3), np.zeros((5, 2), dtype=np.float32)).shape
    (5, 3)
    """
    module.eval()
    predict = getattr(module, "log_proba", None) or (lambda x: logits_of(module, x))
    with torch.no_grad():
        if not is_ragged(X):
            parts = [predict(as_tensor(X[i : i + batch_size])) for i in range(0, max(len(X), 1), batch_size)]
            return np.asarray(torch.cat(parts).numpy())
        out: list[FloatArray] = [np.empty(0)] * len(X)
        size = lengths(X)
        for index in np.array_split(np.argsort(size, kind="stable"), -(-len(X) // min(batch_size, 128))):
            logits = predict(as_tensor(pad(X[index])[0])).numpy()
            for i, row in zip(index, logits, strict=True):
                out[i] = row[: size[i]].copy() if row.ndim > 1 else row
        return as_rows(out)


def predict_samples(module: nn.Module, X: FloatArray, n_samples: int = 10, seed: int = 0) -> list[FloatArray]:
    """Logits of ``n_samples`` passes in which dropout stays on: a committee (Gal and Ghahramani 2016).

    Returns:
        ``n_samples`` arrays as :func:`predict_logits` gives them; all alike where the module has no dropout.

    >>> len(predict_samples(nn.Dropout(0.5), np.ones((5, 2), dtype=np.float32), 3))
    3
    """
    dropped = [m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    handles = [m.register_forward_pre_hook(_left_on) for m in dropped]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [predict_logits(module, X) for _ in range(n_samples)]
    finally:
        for handle in handles:
            handle.remove()
        module.eval()


def _left_on(module: nn.Module, _: object) -> None:
    module.train()

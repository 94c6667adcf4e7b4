"""Train a small network, attack it, and see where it looks: three parts of Trilobe without a project.

Writes ``why.png``: a digit under the heat map of what made the network say what it says.

Prints:

accuracy           ...
robust_accuracy@0.05 ...
the map misses ... of the logit
wrote why.png
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from trilobe.algorithms.fit import Plan, fit, predict_logits
from trilobe.statistics import softmax
from trilobe.tasks.image_classification.model import network
from trilobe.trust.attacks import robust_accuracy
from trilobe.trust.metrics import accuracy
from trilobe.trust.saliency import fullgrad, overlay

digits = load_digits()
X = (digits.images / 16).astype(np.float32)[:, None]  # (n, channels, height, width), 0 to 1
train, test = np.arange(1000), np.arange(1000, 1200)

net = network({"channels": 1, "height": 8, "width": 8}, n_classes=10, seed=0)
fit(net, X[train], np.eye(10)[digits.target[train]], Plan(steps=200, epochs=5))

found = [accuracy(softmax(predict_logits(net, X[test])), digits.target[test])]
found += robust_accuracy(net, X[test], digits.target[test], [0.05], steps=10)
for e in found:
    print(f"{e.check:<20} {e.figure:.3f}  [{e.low:.3f}, {e.high:.3f}]  n = {e.n}")

maps, residual = fullgrad(net, X[test[:1]])
print(f"the map misses {residual[0]:.0e} of the logit")
image = (X[test[0], 0] * 255).round().astype(np.uint8)
Path("why.png").write_bytes(overlay(image, maps[0], scale=24))
print("wrote why.png")

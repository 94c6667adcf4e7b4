"""BentoML: ``bentoml serve bentoml_cnn:Cnn``, with PEER_MODEL and PEER_BATCH in the environment. An image comes
as a base64 string in JSON.
"""

import base64
import os

import bentoml
import net
import numpy as np

BATCH = int(os.environ.get("PEER_BATCH", "0"))
BATCHING = {"batchable": True, "max_batch_size": BATCH, "max_latency_ms": 10_000} if BATCH else {}


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}}, traffic={"timeout": 60})
class Cnn:
    def __init__(self) -> None:
        self.run = net.load(os.environ["PEER_MODEL"])

    @bentoml.api(**BATCHING)
    async def classify(self, images: list[str]) -> list[list[float]]:
        return self.run(np.concatenate([net.image(base64.b64decode(text)) for text in images])).tolist()

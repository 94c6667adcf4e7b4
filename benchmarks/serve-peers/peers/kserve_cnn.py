"""KServe's SDK: ``python kserve_cnn.py MODEL PORT``. It has no batching of its own (a sidecar does that on Kubernetes).

Its log of every request is off, binary answers have to be asked for twice (by the client and here), and a request needs
an id: without one it answers 500.
"""

import logging
import sys

import kserve
import net
from kserve.logging import configure_logging

MODEL, PORT = sys.argv[1], int(sys.argv[2])


class Cnn(kserve.Model):
    def load(self) -> bool:
        self.run = net.load(MODEL)
        self.ready = True
        return True

    async def predict(self, payload: kserve.InferRequest, headers=None, response_headers=None) -> kserve.InferResponse:
        proba = self.run(payload.inputs[0].as_numpy())
        output = kserve.InferOutput("proba", list(proba.shape), "FP32", data=proba)
        return kserve.InferResponse(payload.id, self.name, [output], use_binary_outputs=True)


configure_logging()
for name in ("kserve.trace", "uvicorn.access"):
    logging.getLogger(name).setLevel(logging.ERROR)
cnn = Cnn("cnn")
cnn.load()
kserve.ModelServer(http_port=PORT, enable_grpc=False, enable_latency_logging=False, event_loop="uvloop").start([cnn])

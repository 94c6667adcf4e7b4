"""MLServer: ``python mlserver_cnn.py MODEL PORT BATCH [defaults]``. An image comes as base64 or as 784 numbers in JSON.

Unless its defaults are asked for, what costs it time is off: debug, metrics, and the pool of workers (inference in the
server's own process is faster here). Its defaults need uvloop below 0.22.
"""

import asyncio
import sys

import net
import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings, types
from mlserver.utils import install_uvloop_event_loop

MODEL, PORT, BATCH = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Cnn(MLModel):
    async def load(self) -> bool:
        self.run = net.load(MODEL)
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        sent = payload.inputs[0]
        if sent.datatype == "BYTES":
            images = np.concatenate([net.image(data) for data in self.decode(sent)])
        else:
            images = np.asarray(sent.data.root, np.float32).reshape(sent.shape)
        proba = self.run(images)
        output = types.ResponseOutput(
            name="proba", shape=list(proba.shape), datatype="FP32", data=proba.ravel().tolist()
        )
        return types.InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])


async def main() -> None:
    lean = {} if "defaults" in sys.argv else {"parallel_workers": 0, "debug": False, "metrics_endpoint": None}
    settings = Settings(host="127.0.0.1", http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, **lean)
    batching = {"max_batch_size": BATCH, "max_batch_time": 0.001} if BATCH else {}
    await MLServer(settings).start([ModelSettings(name="cnn", implementation=Cnn, **batching)])


if __name__ == "__main__":  # its pool of workers imports this file again
    install_uvloop_event_loop()
    asyncio.run(main())

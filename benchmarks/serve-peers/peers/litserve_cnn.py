"""LitServe: ``python litserve_cnn.py MODEL PORT BATCH [fast]``. It takes JSON or forms: an image comes as base64."""

import base64
import sys

import litserve as ls
import net
import numpy as np

MODEL, PORT, BATCH = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Cnn(ls.LitAPI):
    def setup(self, device):
        self.run = net.load(MODEL)

    def decode_request(self, request):
        return net.image(base64.b64decode(request["image"]))

    def batch(self, inputs):
        return np.concatenate(inputs)

    def predict(self, images):
        return self.run(images)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"proba": output.ravel().tolist()}


if __name__ == "__main__":
    api = Cnn(max_batch_size=BATCH, batch_timeout=0.001) if BATCH else Cnn()
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue="fast" in sys.argv)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="error", access_log=False)

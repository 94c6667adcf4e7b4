"""Ray Serve: ``python ray_cnn.py MODEL PORT BATCH``: one replica, the body is the image as raw bytes, the answer too.
Run with RAY_SERVE_THROUGHPUT_OPTIMIZED=1.
"""

import signal
import sys

import net
import numpy as np
import ray
from ray import serve

MODEL, PORT, BATCH = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
FOLDER = __file__.rpartition("/")[0] or "."


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1})
class Cnn:
    def __init__(self) -> None:
        self.run = net.load(MODEL)

    @serve.batch(max_batch_size=max(BATCH, 1), batch_wait_timeout_s=0.001)
    async def together(self, bodies):
        proba = self.run(np.concatenate([net.image(body) for body in bodies]))
        return [row.tobytes() for row in proba]

    async def __call__(self, request):
        from starlette.responses import Response

        body = await request.body()
        data = await self.together(body) if BATCH else self.run(net.image(body)).tobytes()
        return Response(data, media_type="application/octet-stream")


ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": FOLDER}}, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": PORT, "access_log": False})
serve.run(Cnn.bind(), route_prefix="/")
signal.sigwait([signal.SIGTERM, signal.SIGINT])
serve.shutdown()
ray.shutdown()

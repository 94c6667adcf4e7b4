"""The model as every peer runs it: ONNX Runtime, one thread that does not spin, one image or a batch of them."""

import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def load(path: str) -> Callable[[Any], Any]:
    """A function from images (n, 1, 28, 28) float32 to probabilities (n, 10)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})[0]


def image(data: bytes) -> Any:
    """One image (1, 1, 28, 28) from its 3,136 bytes."""
    return np.frombuffer(data, "<f4").reshape(1, 1, 28, 28)


def find_libpython() -> None:
    """Start this process again with the folder of this Python's shared library on the loader's path, unless it is.

    The stub of Triton's Python backend is linked against that library.
    """
    folder = sysconfig.get_config_var("LIBDIR") or ""
    if folder and folder not in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([folder, os.environ.get("LD_LIBRARY_PATH", "")])
        os.execv(sys.executable, [sys.executable, *sys.argv])


def serve_with_triton(models: Sequence[str], names: Sequence[str], shape: Sequence[int], port: int, batch: int) -> None:
    """Serve graphs from ``image`` (n, *shape) to ``proba`` (n, 10) by Triton's Python backend until told to stop."""
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    def answering(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def infer(requests: Any) -> Any:
            """One run of the network over whatever Triton's batcher put together."""
            images = np.concatenate([request["image"] for request in requests])
            ends = np.cumsum([len(request["image"]) for request in requests])[:-1]
            return [{"proba": part} for part in np.split(run(images), ends)]

        return infer

    config = TritonConfig(http_address="127.0.0.1", http_port=port, allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        for name, path in zip(names, models, strict=True):
            triton.bind(
                model_name=name,
                infer_func=answering(load(path)),
                inputs=[Tensor(name="image", dtype=np.float32, shape=tuple(shape))],
                outputs=[Tensor(name="proba", dtype=np.float32, shape=(10,))],
                config=ModelConfig(max_batch_size=batch or 1, batcher=DynamicBatcher()),
                strict=False,
            )
        triton.serve()

"""A small Ray cluster for tests, started by a process of its own.

Ray starts its servers by forking. A test process has many threads by then (torch, gRPC), and a child forked from such
a process can hang before it becomes anything else; a fresh process has one thread.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ["RAY_AUTH_MODE"] = "token"  # read when Ray is imported, which is why it stands here
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
OWNER = """
import ray, sys
context = ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
print("address", context.address_info["address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@contextmanager
def cluster() -> Iterator[str]:
    """A cluster of two cores that this process is connected to; its address. Skips where Ray is not installed.

    Its workers find what this folder's siblings define, as the tests do.
    """
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "RAY_gcs_server_port_wait_time_s": "120"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    ) as owner:  # fmt: skip
        try:
            assert owner.stdout is not None
            address = next((line.split()[1] for line in owner.stdout if line.startswith("address")), "")
            assert address, "Ray did not start: see what it printed above"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address=address, configure_logging=False, log_to_driver=False)
            yield address
        finally:
            ray.shutdown()
            owner.communicate("", timeout=60)

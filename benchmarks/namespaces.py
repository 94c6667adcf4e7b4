"""Workers in network namespaces of their own: their veth interfaces meet on a bridge in one more, bytes are what the
kernel counts at an interface, rates are set by tc (tbf) on what each worker sends. Needs Linux, iproute2 and root."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def usable() -> bool:
    """Whether namespaces can be made here; says so on stderr where not."""
    if os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc"))):
        return True
    print("skipped: network namespaces need root, and ip and tc (Debian's iproute2)", file=sys.stderr)
    return False


def shell(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def make(names: list[str]) -> None:
    """The first is the hub with a bridge; the others are workers 10.77.0.1, 10.77.0.2, ..."""
    hub = names[0]
    for name in names:
        shell("ip", "netns", "add", name)
        shell("ip", "-n", name, "link", "set", "lo", "up")
    shell("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
    shell("ip", "-n", hub, "link", "set", "bridge", "up")
    for i, name in enumerate(names[1:], start=1):
        shell("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", hub)
        shell("ip", "-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
        shell("ip", "-n", name, "link", "set", "eth0", "up")
        shell("ip", "-n", hub, "link", "set", f"port{i}", "master", "bridge", "up")


def counted() -> tuple[int, int]:
    """Bytes received and sent at eth0 of this process's namespace."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("eth0:"))
    fields = line.split(":")[1].split()
    return int(fields[0]), int(fields[8])


def set_rate(rate: str, burst: str) -> None:
    """Limit what this process's namespace sends; an empty ``rate`` takes the limit away."""
    if rate:
        shell("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", burst, "latency", "300ms")
    else:
        subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=False, stderr=subprocess.DEVNULL)


def run(script: str, workers: int, words: Sequence[str], timeout: float = 400) -> Any:
    """What worker 0 of ``script --child RANK WORKERS FOLDER words...`` writes to FOLDER/seen.json; namespaces up
    before, and down again whatever happened."""
    names = [f"trilobe{os.getpid()}n{i}" for i in range(workers + 1)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            make(names)
            for rank, name in enumerate(names[1:]):
                command = [sys.executable, script, "--child", str(rank), str(workers), folder, *words]
                processes.append(subprocess.Popen(["ip", "netns", "exec", name, *command], env=quiet))
            for process in processes:
                if process.wait(timeout=timeout):
                    raise SystemExit(f"a worker ended with {process.returncode}")
            return json.loads(Path(folder, "seen.json").read_text())
        finally:
            for process in processes:
                process.kill()
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False)

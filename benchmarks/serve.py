"""Load on mode=serve over loopback: requests per second and latency by the number of clients, and resident memory.

Usage: python benchmarks/serve.py RUN_FOLDER [--requests N]

Each client sends the next image when it has its answer. Every answer is compared with that of a single client.
"""

import argparse
import http.client
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
CLIENTS = (1, 8, 32, 50)
SIZE = (192, 320)


def picture(seed):
    """Return a smooth random picture as PNG."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 10, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@contextmanager
def serving(run):
    """Start mode=serve, and give its process and port; stop it at the end."""
    words = [f"resume={os.path.abspath(run)}", "engine=cpu", "mode.port=0", "hydra.run.dir=run"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(HERE), *sys.path])}
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "dinoseg", "mode=serve", *words],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )
        try:
            line = next(line for line in process.stdout if line.startswith("listening"))
            yield process, int(re.search(r":(\d+)$", line.strip())[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def post(connection, body):
    connection.request("POST", "/segment", body, {"content-type": "image/png"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def run_clients(port, clients, requests, wanted):
    """Send requests from several clients; return the total seconds and those of each request."""
    latencies, left, lock = [], list(range(requests)), threading.Lock()

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                if not left:
                    return
                number = left.pop()
            body, answer = wanted[number % len(wanted)]
            start = time.perf_counter()
            status, got = post(connection, body)
            latencies.append(time.perf_counter() - start)
            assert (status, got) == (200, answer), f"request {number}: {status}"

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(latencies) == requests
    return time.perf_counter() - start, latencies


def resident(process):
    """Return a process's resident memory in MiB."""
    with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=200)
    given = parser.parse_args()
    with serving(given.run) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        wanted = [(body, post(connection, body)[1]) for body in map(picture, range(16))]
        run_clients(port, 8, 64, wanted)
        print(f"load {os.getloadavg()[0]:.1f}, {resident(process):.0f} MiB")
        print(f"{'clients':>8} {'requests/s':>11} {'p50 ms':>8} {'p95 ms':>8}")
        for clients in CLIENTS:
            seconds, latencies = run_clients(port, clients, max(given.requests, clients), wanted)
            p50, p95 = (1000 * np.percentile(latencies, share) for share in (50, 95))
            print(f"{clients:>8} {len(latencies) / seconds:>11.1f} {p50:>8.0f} {p95:>8.0f}", flush=True)
        print(f"load {os.getloadavg()[0]:.1f}, {resident(process):.0f} MiB")


if __name__ == "__main__":
    main()

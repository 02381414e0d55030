"""Load on mode=serve over loopback: batching against none and a plain endpoint; a soak with memory and a graceful stop.

Usage: python benchmarks/serve.py RUN_FOLDER [--soak MINUTES] [--requests N] [--rounds N]

Without --soak: requests/s and p95 latency of batch_size=8 and of plain_endpoint.py against the reference, mode=serve
with batch_size=1, for several numbers of clients, in turns; every answer is held against the reference's.
With --soak: eight clients for so many minutes at the default batch size, with pictures of several sizes, damaged ones
and clients that hang up; the server's resident memory is sampled, and at the end it is stopped with requests in hand:
none may be lost.
"""

import argparse
import http.client
import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
CLIENTS = (1, 8, 32, 50)
SIZES = ((192, 320), (240, 320), (96, 128))


def picture(size, seed=0):
    """Return a smooth random picture as PNG."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 10, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@contextmanager
def server(run, batch_size):
    """Start mode=serve, and give its process and port; stop it at the end."""
    words = [f"resume={os.path.abspath(run)}", "engine=cpu", "mode.port=0", f"mode.batch_size={batch_size}"]
    with started("-m", "dinoseg", "mode=serve", *words, "hydra.run.dir=run") as process:
        line = next(line for line in process.stdout if line.startswith("listening"))
        yield process, int(re.search(r":(\d+)$", line.strip())[1])


@contextmanager
def plain(run):
    """Start the plain endpoint, and give its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started(os.path.join(HERE, "plain_endpoint.py"), os.path.abspath(run), str(port)) as process:
        while process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        yield port


@contextmanager
def started(*words):
    """Run Python in a folder of its own; stop it at the end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(HERE), *sys.path])}
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def post(connection, body):
    connection.request("POST", "/segment", body, {"content-type": "image/png"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def differing(mask, other):
    """Return the share of pixels in which two masks of a picture differ: another batch is rounded otherwise."""
    first, second = (np.asarray(Image.open(io.BytesIO(data))) for data in (mask, other))
    return float((first != second).mean()) if first.shape == second.shape else 1.0


def loaded(port, clients, requests, wanted):
    """Send requests from so many clients, each the next one when it has its answer.

    Returns:
        The seconds of all, each one's, and the largest share of pixels in which an answer differs from what is wanted.
    """
    latencies, answers, left, lock = [], [], list(range(requests)), threading.Lock()

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
            assert status == 200, f"request {number}: {status}"
            answers.append((got, answer))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    assert len(answers) == requests
    return seconds, latencies, max(differing(*pair) for pair in answers)


def compare(run, requests, rounds):
    """Print requests/s and p95 with and without batching, and of the plain endpoint."""
    with server(run, 1) as (_, alone), server(run, 8) as (_, batched), plain(run) as naive:
        ports = {"batch_size=1 (reference)": alone, "batch_size=8": batched, "plain endpoint": naive}
        connection = http.client.HTTPConnection("127.0.0.1", alone)
        bodies = [picture(SIZES[0], seed) for seed in range(16)]
        wanted = [(body, post(connection, body)[1]) for body in bodies]
        for port in ports.values():
            loaded(port, 8, 64, wanted)
        head = f"{'clients':>8} {'server':<26} {'requests/s':>11} {'p50 ms':>8} {'p95 ms':>8} {'ratio':>6}"
        print(f"load {os.getloadavg()[0]:.1f}\n{head} {'pixels that differ, at most':>28}")
        for clients in CLIENTS:
            rates, times, differ = ({port: [] for port in ports.values()} for _ in range(3))
            for _ in range(rounds):
                for port in ports.values():
                    seconds, latencies, share = loaded(port, clients, max(requests, clients), wanted)
                    rates[port].append(len(latencies) / seconds)
                    times[port] += latencies
                    differ[port].append(share)
            for name, port in ports.items():
                rate = statistics.median(rates[port])
                p50, p95 = (1000 * np.percentile(times[port], share) for share in (50, 95))
                ratio, most = rate / statistics.median(rates[alone]), max(differ[port])
                row = f"{clients:>8} {name:<26} {rate:>11.1f} {p50:>8.0f} {p95:>8.0f} {ratio:>6.2f}"
                print(f"{row} {100 * most:>26.3f} %", flush=True)
        print(f"load {os.getloadavg()[0]:.1f}")


def resident(process):
    """Return a process's resident memory in MiB."""
    with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) / 1024


def soak(run, minutes):
    """Print memory over time, and what became of every request."""
    outcomes, lost, stopping = Counter(), [], threading.Event()
    bodies = [picture(size, seed) for seed in range(8) for size in SIZES]

    def client(port, seed):
        draw = np.random.default_rng(seed)
        while not stopping.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            body = bodies[draw.integers(len(bodies))]
            kind = draw.choice(["whole", "damaged", "hangs up"], p=[0.9, 0.05, 0.05])
            try:
                connection.connect()
            except OSError:  # it does not listen any more: nothing was taken, nothing can be lost
                outcomes["not connected"] += 1
                return
            try:
                if kind == "hangs up":
                    connection.request("POST", "/segment", body)
                    connection.sock.shutdown(socket.SHUT_RDWR)
                    outcomes["hung up"] += 1
                else:
                    status, _ = post(connection, body if kind == "whole" else body[:200])
                    outcomes[f"{kind}: {status}"] += 1
            except (OSError, http.client.HTTPException) as error:
                lost.append(f"{kind}: {error!r}")
            connection.close()

    with server(run, "null") as (process, port):
        threads = [threading.Thread(target=client, args=(port, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        start, samples = time.monotonic(), []
        while (passed := time.monotonic() - start) < 60 * minutes:
            samples.append((passed, resident(process)))
            time.sleep(5)
        process.send_signal(signal.SIGTERM)
        print(process.stdout.read().strip())
        for thread in threads:
            thread.join()
        print(f"exit status {process.wait()}")
    print(json.dumps(dict(sorted(outcomes.items()))), f"lost: {len(lost)}", *lost[:5])
    for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
        passed, memory = samples[round(share * (len(samples) - 1))]
        print(f"after {passed / 60:5.1f} min: {memory:7.1f} MiB")
    later = [memory for passed, memory in samples if passed > 60 * minutes / 10]
    slope = np.polyfit(np.arange(len(later)) * 5 / 60, later, 1)[0]
    print(f"growth after the first tenth: {slope:+.2f} MiB a minute")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--soak", type=float)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.soak:
        soak(given.run, given.soak)
    else:
        compare(given.run, given.requests, given.rounds)


if __name__ == "__main__":
    main()

"""What tests of experiment trackers read back: files of W&B, and an MLflow server of their own."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from command_line import call

BLOCK = 2**15  # bytes of a block of a .wandb file
HEADER = 7  # of the file, and of each part of a record
SERVER = """
import os, sys
folder, descriptor = sys.argv[1:]
os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
os.environ["_MLFLOW_SERVER_ARTIFACT_DESTINATION"] = f"{folder}/artifacts"
os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = "mlflow-artifacts:/"
from mlflow.server import app
from werkzeug.serving import make_server
make_server("127.0.0.1", 0, app, threaded=True, fd=int(descriptor)).serve_forever()
"""


def wandb_records(path):
    """Yield the records of a .wandb file, which is a log in LevelDB's format: parts of records in blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    at = HEADER
    whole = b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the end of a block is padding
            at += BLOCK - at % BLOCK
            continue
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        kind = data[at + 6]
        if at + HEADER + length > len(data):  # being written
            return
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def wandb_run(folder):
    """Return the descriptions of the run in a folder, the rows of its history and its summary, as written."""
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 300  # W&B's service may write the end of a file after the run is finished
    while not all(_of_kind(path, "exit") for path in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    runs = [run for path in files for run in _of_kind(path, "run")]
    rows = [_items(history.item) for path in files for history in _of_kind(path, "history")]
    summary = {}
    for each in (each for path in files for each in _of_kind(path, "summary")):
        summary |= _items(each.update)
    return runs, rows, summary


def _of_kind(path, kind):
    return [getattr(each, kind) for each in wandb_records(path) if each.WhichOneof("record_type") == kind]


def _items(items):
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


class MlflowServer:
    """An MLflow server on this machine, with SQLite in a folder."""

    def __init__(self, folder):
        self.folder = folder
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "_MLFLOW"))}
        # the server inherits the socket, so that nobody else can take its port
        with (folder / "server.log").open("w") as log, socket.create_server(("127.0.0.1", 0)) as listening:
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            words = [sys.executable, "-c", SERVER, str(folder), str(listening.fileno())]
            given = {"stdout": log, "stderr": subprocess.STDOUT, "pass_fds": [listening.fileno()]}
            self.process = subprocess.Popen(words, env=env, cwd=folder, **given)
        for _ in range(1500):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def ask(self, path, **body):
        """Return the answer of the REST API to a POST, or to a GET without a body."""
        data = json.dumps(body).encode() if body else None
        address = f"{self.url}/api/2.0/mlflow/{path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def runs(self, experiment="dinoseg"):
        found = self.ask(f"experiments/get-by-name?experiment_name={experiment}")["experiment"]["experiment_id"]
        return self.ask("runs/search", experiment_ids=[found])["runs"]

    def history(self, run, key):
        """Return the (step, value) pairs of a metric."""
        found = self.ask(f"metrics/get-history?run_id={run['info']['run_id']}&metric_key={urllib.request.quote(key)}")
        return [(int(each["step"]), each["value"]) for each in found["metrics"]]


class WandbServer:
    """Stand-in for W&B's server: accepts any run and file, and stores the rows of its history."""

    def __init__(self):
        self.rows = []
        handler = type("Handler", (_WandbHandler,), {"rows": self.rows})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def kill(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class _WandbHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        answer = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            answer = {"data": self.data(name, asked["variables"])}
        elif self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.rows += [json.loads(line) for line in lines]
        self.answer(json.dumps(answer).encode())

    do_GET = do_PUT = do_POST

    def data(self, name, variables):
        project = {"id": "p", "name": "dinoseg", "entity": {"id": "e", "name": "me"}}
        if name == "UpsertBucket":
            bucket = {"id": "aQ==", "name": "run", "displayName": "run", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if name == "CreateRunFiles":
            url = f"http://{self.headers['host']}/upload"
            files = [{"name": file, "uploadUrl": url} for file in variables["files"]]
            return {"createRunFiles": {"runID": "aQ==", "uploadHeaders": [], "files": files}}
        return {"model": {**project, "bucket": None}} if name == "RunResumeStatus" else {}

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def silent_server():
    """Accept connections on a port and never answer; yield the address."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(100)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def json_lines(folder: Path):
    """Return the values of metrics.jsonl as {(key, step): value}, without nulls."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {(key, row["step"]): value for row in rows for key, value in row.items()}
    return {key: value for key, value in values.items() if key[0] != "step" and value is not None}


def crash_and_resume(folder, *words):
    """Resume a run of two steps, and again from its second step, as if killed before its fourth step was saved."""
    shutil.copytree(folder / "run/checkpoints", folder / "before")
    for _ in range(2):
        shutil.rmtree(folder / "run/checkpoints")
        shutil.copytree(folder / "before", folder / "run/checkpoints")
        done = call(folder, *words, "resume=run", "trainer.steps=4")
        assert done.status == 0 and "failed and is dropped" not in done.err, done.err


def check_same(found, written):
    """Compare the values of a tracker with those of metrics.jsonl: all keys and steps, and all that is no time."""
    assert found.keys() == written.keys() and {step for _, step in written} == {1, 2, 3, 4}
    measured = ("train/images_per_s", "train/data_wait", "train/memory_gib")
    assert not [key for key in written if key[0] not in measured and found[key] != written[key]]

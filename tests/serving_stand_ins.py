"""A stand-in for a trained model that many clients share: class 1 where a pixel is bright."""

import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager, suppress

import numpy as np
import torch
from fastapi.testclient import TestClient
from image_files import encode_image  # noqa: F401

from dinoseg.extensions.serving.child import Channel, Child
from dinoseg.extensions.serving.endpoint import build_endpoint
from dinoseg.extensions.serving.server import list_hosts
from dinoseg.extensions.serving.shared import SharedModel
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.model import Model

FACTS = ModelFacts(("dark", "bright"), ((0, 0, 0), (255, 0, 0)), 255)
LAYER_FACTS = ModelFacts(("bright", "red", "never"), ((255, 255, 255), (255, 0, 0), (0, 0, 255)), 255)


class Bright:
    """A runtime that needs no model; `before` is called with each batch."""

    name = "stand-in"
    task = "semantic"
    things = ()

    def __init__(self, before=lambda images: None):
        self.before = before

    def ids(self, images):
        self.before(images)
        return (np.stack(images).mean(axis=-1) > 127).astype(np.uint8)

    def predict(self, images):
        return [(mask, None) for mask in self.ids(images)]


class Layers(Bright):
    """A runtime of classes that overlap: bright pixels, those with much red, and none."""

    task = "multilabel"

    def ids(self, images):
        self.before(images)
        pixels = np.stack(images)
        layers = (pixels.mean(axis=-1) > 127, pixels[..., 0] > 127, np.zeros(pixels.shape[:3]))
        return np.stack(layers, axis=1).astype(np.uint8)


def compute_endlessly(images):
    """Call torch functions until one raises an error."""
    while True:
        torch.add(torch.zeros(1), 1)


def picture(height=4, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


class InThread(Child):
    """A `Child` whose function runs in a thread of this process, which starts at once."""

    _is_ready = True

    def __init__(self, function, memory):
        self._ends = socket.socketpair()
        self._files = [end.makefile(mode) for end in self._ends for mode in ("rb", "wb")]
        self._channel = Channel(*self._files[:2])
        self._thread = threading.Thread(target=self._work, args=(function,), daemon=True)
        self._thread.start()

    def _work(self, function):
        with suppress(OSError):
            function(Channel(*self._files[2:]))
        self.kill()

    @property
    def is_alive(self):
        return self._thread.is_alive()

    def kill(self):
        with suppress(OSError):
            self._ends[0].shutdown(socket.SHUT_RDWR)

    def close(self):
        self.kill()
        self._thread.join()
        for file in (*self._files, *self._ends):
            with suppress(OSError):
                file.close()


@contextmanager
def shared_model(before=lambda images: None, max_pixels=10_000, *, has_layers=False, model=None, **limits):
    if model is None:
        model = Model(Layers(before), LAYER_FACTS) if has_layers else Model(Bright(before), FACTS)
    with closing(SharedModel(model, max_pixels, **limits)) as shared:
        yield shared


@contextmanager
def client(folder, before=lambda images: None, *, max_mib=1.0, max_pixels=10_000, **options):
    with shared_model(before, max_pixels, **options) as shared:
        application = build_endpoint(shared, folder, hosts=list_hosts("127.0.0.1", []), max_mib=max_mib)
        with TestClient(application, base_url="http://localhost") as asked:
            yield asked


@contextmanager
def start_server(mode, trained, folder, *words, program=("-m", "dinoseg")):
    """Run a mode with the trained segmenter in a process, which logs to `folder`/log; yield it and its address.

    `program` are the words after those of Python.
    """
    words = [f"mode={mode}", f"resume={trained}/segmenter", "engine=cpu", "mode.port=0", *words]
    with open(folder / "log", "w", encoding="utf-8") as log:
        command = [sys.executable, *program, *words]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield process, next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=300)

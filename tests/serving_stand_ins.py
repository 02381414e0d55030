"""A stand-in for a trained model, and a service of it: class 1 where a pixel is bright."""

import atexit
import functools
import io
import socket
import threading
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from dinoseg.export.runtime.facts import ModelFacts
from dinoseg.export.runtime.model import Model
from dinoseg.serving.decoding import Decoders
from dinoseg.serving.endpoint import endpoint
from dinoseg.serving.guard import Hosts
from dinoseg.serving.limits import Limits
from dinoseg.serving.service import Service
from dinoseg.utils.child import Channel, Child

FACTS = ModelFacts(("dark", "bright"), ((0, 0, 0), (255, 0, 0)), 255)


class Bright:
    """A runtime that needs no model; `before` is called with each batch."""

    name = "stand-in"

    def __init__(self, before=lambda images: None):
        self.before = before

    def ids(self, images):
        self.before(images)
        return (np.stack(images).mean(axis=-1) > 127).astype(np.uint8)


def picture(height=4, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


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

    def kill(self):
        with suppress(OSError):
            self._ends[0].shutdown(socket.SHUT_RDWR)

    def close(self):
        self.kill()
        self._thread.join()
        for file in (*self._files, *self._ends):
            with suppress(OSError):
                file.close()


@functools.cache
def decoders():
    """Return processes that decode for all tests: they are slow to start."""
    made = Decoders(2**20, count=2)
    atexit.register(made.end)
    return made


@contextmanager
def service(before=lambda images: None, *, batch_size=4, wait=0.0, **limits):
    made = Service(
        Model(Bright(before), FACTS), Limits(**limits), batch_size=batch_size, wait=wait, decoders=decoders()
    )
    try:
        yield made
    finally:
        made.close()


@contextmanager
def client(before=lambda images: None, **options):
    with service(before, **options) as made:
        with TestClient(endpoint(made, Hosts.of("127.0.0.1")), base_url="http://localhost") as asked:
            yield asked

"""A stand-in for a trained model, and a service of it: class 1 where a pixel is bright."""

import io
from contextlib import contextmanager

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from dinoseg.portable.facts import Facts
from dinoseg.portable.model import Model
from dinoseg.serving.endpoint import endpoint
from dinoseg.serving.guard import Hosts
from dinoseg.serving.limits import Limits
from dinoseg.serving.service import Service

FACTS = Facts(("dark", "bright"), ((0, 0, 0), (255, 0, 0)), 255)


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


@contextmanager
def service(before=lambda images: None, *, batch_size=4, wait=0.0, **limits):
    made = Service(Model(Bright(before), FACTS), Limits(**limits), batch_size=batch_size, wait=wait)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def client(before=lambda images: None, **options):
    with service(before, **options) as made:
        with TestClient(endpoint(made, Hosts.of("127.0.0.1")), base_url="http://localhost") as asked:
            yield asked

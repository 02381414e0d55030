"""The process that `proof.Exported` starts to run an exported file, without torch for ONNX files.

It reads JSON lines and writes arrays, each after its length in bytes: class ids, thinned probabilities and seconds.
"""

import json
import os
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dinoseg.export.runtime.onnx_pictures import GraphRuntime
from dinoseg.export.runtime.onnx_record import GraphRecord
from dinoseg.export.runtime.runtime import Runtime
from dinoseg.utils.images import read_image

MAX = 2**22  # number of probabilities compared per image


def answer(kind: str, path: str, threads: int, record: str) -> None:
    """Write the answers for the image paths read from standard input, until it ends.

    Args:
        kind: onnx or program.
        path: the exported file.
        threads: number of compute threads.
        record: of a program's graph, as JSON.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not corrupt the arrays
    runtime = _onnx(path, threads) if kind == "onnx" else _program(path, threads, record)
    for line in sys.stdin:
        picture, times = json.loads(line)
        image = read_image(picture)
        seconds = [timed(runtime, image) for _ in range(times)]
        _write(out, runtime.ids([image])[0])
        _write(out, thinned(runtime.probabilities([image])[0]))
        _write(out, np.array(seconds, np.float64))
        out.flush()


def timed(runtime: Runtime, image: np.ndarray) -> float:
    """Return the seconds from an image (H, W, 3) in memory to its class ids."""
    start = time.perf_counter()
    runtime.ids([image])
    return time.perf_counter() - start


def thinned(probabilities: np.ndarray) -> np.ndarray:
    """Subsample the rows and columns of (K, H, W) by one common step, to about `MAX` values at most."""
    step = max(1, int(np.ceil((probabilities.size / MAX) ** 0.5)))
    return np.ascontiguousarray(probabilities[:, ::step, ::step], np.float32)


def _onnx(path: str, threads: int) -> Runtime:
    from dinoseg.export.runtime.onnx_model import load_onnx

    return load_onnx(Path(path), device="cpu", threads=threads)[0]


def _program(path: str, threads: int, record: str) -> Runtime:
    import torch

    torch.set_num_threads(threads)
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def compute(pixels: np.ndarray) -> list[np.ndarray]:
        return [part.numpy() for part in module(torch.from_numpy(pixels))]

    return GraphRuntime(compute, GraphRecord.of(json.loads(record), path))


def _write(out: BinaryIO, array: np.ndarray) -> None:
    content = BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=False)
    out.write(len(content.getvalue()).to_bytes(8, "little"))
    out.write(content.getbuffer())

"""Verification of exported files: compare their answers on real images with those of the trained model.

The file runs in a process of its own, an ONNX file in one that cannot import torch.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from statistics import median
from threading import Timer
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import dinoseg
from dinoseg.core.geometry import resize
from dinoseg.core.shapes import Prediction
from dinoseg.export.answers import thinned, timed
from dinoseg.export.options import GraphOptions
from dinoseg.export.pictures import Picture
from dinoseg.export.runtime.onnx_record import GraphRecord
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image

MIN_LIMIT, LIMIT_TIMES = 300.0, 50  # timeout of an answer: 300 s + 50 times PyTorch's time
TIMES = 5  # timed runs per image, after one warm-up run; also the number of timed images
_LAST_WORDS = 5  # seconds to wait for the exit code
_OURS = "dinoseg.utils.errors.UserError: "
_LONGEST = 2**31  # largest array accepted, in bytes
_START = (
    "import sys; {block}from dinoseg.export.answers import answer; "
    "answer(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])"
)


class Reference:
    """The trained model in PyTorch, run as mode=predict runs it.

    For a fixed-size graph, it runs at that graph's input size instead.

    Args:
        segmenter: on the CPU, in eval mode.
        record: of the exported graph.
    """

    name = "torch"

    def __init__(self, segmenter: SegmentationModel, record: GraphRecord) -> None:
        self.segmenter = segmenter
        self.record = record

    @torch.inference_mode()
    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size."""
        return self._predict(images).class_ids().numpy()

    @torch.inference_mode()
    def predicted(self, image: np.ndarray) -> np.ndarray:
        """Return the class ids (H, W) that mode=predict gives an image (H, W, 3), whatever the graph's input size."""
        whole = self.segmenter(torch.from_numpy(image[None].copy()).permute(0, 3, 1, 2))
        return whole.class_ids()[0].numpy()

    @torch.inference_mode()
    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        return self._predict(images).logits().float().softmax(dim=1).numpy()

    @torch.inference_mode()
    def scores(self, image: np.ndarray) -> np.ndarray:
        """Return the class scores (K, H, W) of an image (H, W, 3)."""
        return self._predict([image]).scores()[0].numpy()

    def pixels(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) uint8 as the graph's input."""
        layout = self.record.layout((images.shape[-2], images.shape[-1]))
        floats = images.float() / 255
        if layout.content != tuple(images.shape[-2:]):
            floats = resize(floats, layout.content)
        padded = self.segmenter.backbone.mean.repeat(len(floats), 1, *layout.padded)
        padded[..., : layout.content[0], : layout.content[1]] = floats
        return padded

    def _predict(self, images: Sequence[np.ndarray]) -> Prediction:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        if self.record.size is None:
            return self.segmenter(batch)
        size = (batch.shape[-2], batch.shape[-1])
        head = self.segmenter.head
        outputs = head.run(self.segmenter.backbone, self.pixels(batch))
        return Prediction(outputs, size, self.record.layout(size).valid, head.predict, head.mixture)


class Exported:
    """A running process that computes answers with an exported file."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, log: IO[bytes]) -> None:
        self._process = process
        self._path = path
        self._log = log

    def __call__(self, picture: Path, times: int, usual: float) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Return an image's class ids, its `thinned` probabilities and the seconds of each timed run.

        Args:
            picture: the image file.
            times: number of timed runs.
            usual: seconds that PyTorch takes for these runs; sets the timeout after which the process is killed.

        Raises:
            UserError: if the process ends, times out or gives an invalid answer; the message quotes its last line.
        """
        into, out = self._process.stdin, self._process.stdout
        assert into is not None and out is not None
        limit = MIN_LIMIT + LIMIT_TIMES * usual
        timer = Timer(limit, self._process.kill)
        timer.start()
        try:
            into.write(json.dumps([str(picture.absolute()), times]).encode() + b"\n")
            into.flush()
            arrays = [_read(out) for _ in range(3)]
        except (OSError, ValueError) as error:
            with suppress(OSError):  # closing flushes unsent bytes: let that fail here, not when Popen closes the pipe
                into.close()
            timeout = f"no answer within {limit:.0f} s; PyTorch took {usual:.1f} s" if timer.finished.is_set() else ""
            raise UserError(
                f"{self._path.name} returns no result for {picture.name}: "
                f"{(timeout or self._last_words()).rstrip('. ')}. "
                "Choose another export.opset or precision, or smaller images in export.images."
            ) from error
        finally:
            timer.cancel()
        return arrays[0], arrays[1], arrays[2].tolist()

    def _last_words(self) -> str:
        try:
            code = self._process.wait(timeout=_LAST_WORDS)
        except subprocess.TimeoutExpired:  # still running, so its answer was malformed
            self._process.kill()
            code = 0
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        killed = (
            f"its process was killed by signal {-code} ({signal.strsignal(-code)}), as when memory runs out; "
            if code < 0
            else ""
        )
        return killed + (lines or ["it ended without a message"])[-1].removeprefix(_OURS)[-2000:]


def _read(out: IO[bytes]) -> np.ndarray:
    length = int.from_bytes(out.read(8), "little")
    content = out.read(length) if 0 < length <= _LONGEST else b""
    if not content or len(content) < length:
        raise OSError("it is not a valid answer")
    return np.lib.format.read_array(BytesIO(content), allow_pickle=False)


@contextmanager
def exported(kind: str, path: Path, record: GraphRecord) -> Iterator[Exported]:
    """Start the process of an exported file and yield its handle.

    Args:
        kind: onnx (torch cannot be imported there) or program.
        path: the exported file.
        record: of its graph.
    """
    code = _START.format(block="sys.modules['torch'] = None; " if kind == "onnx" else "")
    package = str(Path(dinoseg.__file__).absolute().parent.parent)
    where = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    record_text = json.dumps(record.plain())
    # -P: keeps the working folder, which others may write to, off sys.path
    words = [sys.executable, "-P", "-c", code, kind, str(path.absolute()), str(torch.get_num_threads()), record_text]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            words,
            env={**os.environ, "PYTHONPATH": where},
            cwd=path.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        try:
            yield Exported(process, path, log)
        finally:
            process.kill()


def compare(
    reference: Reference, ask: Exported, pictures: Sequence[Picture], num_classes: int, ignore_index: int
) -> dict[str, Any]:
    """Measure the agreement of an exported file with the trained model on images, and the latency of both.

    Without masks, the file's `miou` is computed against the trained model's classes, and the trained model's is 1.

    Raises:
        UserError: if the trained model gives NaN probabilities, since NaN would agree with anything.
    """
    ours, theirs = (ConfusionMatrix(num_classes, ignore_index) for _ in range(2))
    between = ConfusionMatrix(num_classes)  # exported against trained class ids, no id ignored
    equal, as_predicted, largest, seconds = 0, 0, 0.0, ([], [])  # type: ignore[var-annotated]
    fixed_size_reason = reference.record.size is not None
    for number, picture in enumerate(pictures):
        image, times = read_image(picture.path), TIMES + 1 if number < TIMES else 1
        seconds[0].append([timed(reference, image) for _ in range(times)])
        wanted, expected = reference.ids([image])[0], thinned(reference.probabilities([image])[0])
        if not np.isfinite(expected).all():
            raise UserError(
                f"{picture.path.name}: the trained model's own probabilities are NaN, so the export cannot be "
                "verified. Choose an earlier checkpoint."
            )
        given, probabilities, measured = ask(picture.path, times, sum(seconds[0][-1]))
        seconds[1].append(measured)
        equal += int((wanted == given).sum())
        largest = float(np.maximum(largest, np.abs(expected - probabilities).max()))  # NaN stays NaN
        between.update(torch.from_numpy(given), torch.from_numpy(wanted))
        if fixed_size_reason:
            as_predicted += int((reference.predicted(image) == given).sum())
        if picture.mask is not None:
            ours.update(torch.from_numpy(wanted), torch.from_numpy(picture.mask))
            theirs.update(torch.from_numpy(given), torch.from_numpy(picture.mask))
    total = between.compute()
    scored = ours.compute()["miou"] is not None
    torch_seconds, file_seconds = (median(value for row in rows[:TIMES] for value in row[1:]) for rows in seconds)
    return {
        "pictures": len(pictures),
        "pixels": total["pixels"],
        "agreement": equal / total["pixels"],
        **({"agreement_with_predict": as_predicted / total["pixels"]} if fixed_size_reason else {}),
        "finite": math.isfinite(largest),
        "largest_difference_of_probabilities": largest if math.isfinite(largest) else None,
        "has_masks": scored,
        "references": "masks of the data set" if scored else "the trained model's own classes",
        "miou": {
            "torch": ours.compute()["miou"] if scored else 1.0,
            "exported": theirs.compute()["miou"] if scored else total["miou"],
        },
        "latency_ms": {
            "torch": 1000 * torch_seconds,
            "exported": 1000 * file_seconds,
            "ratio": file_seconds / torch_seconds,
            "how": f"median of {TIMES} runs for each of {min(TIMES, len(pictures))} images, one at a time, from the "
            f"array in memory to class ids, on the CPU with {torch.get_num_threads()} threads; PyTorch eager",
        },
    }


def passes(result: dict[str, Any], options: GraphOptions) -> bool:
    """Return whether a comparison meets the required agreement; NaN, which would agree with anything, fails."""
    points = 100 * abs(result["miou"]["torch"] - result["miou"]["exported"])
    return result["finite"] and result["agreement"] >= options.min_agreement and points <= options.max_miou_drop

"""What the gate makes of answers: counted, NaN refused, and a process that hangs, dies or talks nonsense told of."""

import subprocess
import sys
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import write_data

from dinoseg.export import answers, proof
from dinoseg.export.options import GraphOptions
from dinoseg.export.pictures import Picture
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids

SIZE = (32, 48)


class Fixed:
    """A model that gives the same class ids and probabilities for each picture."""

    def __init__(self, ids, probabilities, size=None, predicted=None):
        self.record, self._ids, self._probabilities, self._predicted = (
            SimpleNamespace(size=size),
            ids,
            probabilities,
            predicted,
        )

    def ids(self, images):
        return self._ids[None]

    def probabilities(self, images):
        return self._probabilities[None]

    def predicted(self, image):
        return self._predicted


@pytest.fixture
def picture(tmp_path):
    """Return a picture with its mask of two classes."""
    write_data(tmp_path, val=1)
    return Picture(tmp_path / "val/images/0.png", "0", SIZE, read_ids(tmp_path / "val/masks/0.png").copy())


def test_pixels_points_and_what_predict_gives_are_counted(picture):
    ids, half = picture.mask.copy(), np.full((2, *SIZE), 0.5, np.float32)
    given = ids.copy()
    given[0, :24] = 1 - given[0, :24]  # 24 of 1,536 pixels
    predicted = given.copy()
    predicted[:8] = 1 - predicted[:8]  # 384 of them
    moved = half + np.float32([0.25, 0])[:, None, None]

    def answer(path, times, usual):
        assert path == picture.path and times == proof.TIMES + 1 and usual > 0
        return given, moved, [9.0, *[0.5] * (times - 1)]

    result = proof.compare(Fixed(ids, half, SIZE, predicted), answer, [picture], 2, 255)
    assert result["agreement"] == 1 - 24 / 1536 and result["agreement_with_predict"] == 0.75
    assert result["miou"]["torch"] == 1 and 0.9 < result["miou"]["exported"] < 1 and result["pixels"] == 1536
    assert result["largest_difference_of_probabilities"] == 0.25 and result["latency_ms"]["exported"] == 500
    assert result["references"] == "masks of the data set"
    alone = proof.compare(Fixed(given, half), answer, [Picture(picture.path, "0", SIZE)], 2, 255)
    assert "agreement_with_predict" not in alone and alone["references"] == "the trained model's own classes"
    assert alone["agreement"] == alone["miou"]["exported"] == alone["miou"]["torch"] == 1


def test_limits_are_what_is_asked_for():
    result = {"finite": True, "agreement": 0.999, "miou": {"torch": 0.5, "exported": 0.4990625}}
    assert proof.passes(result, GraphOptions())
    assert proof.passes(result, GraphOptions(max_miou_drop=100 * (0.5 - 0.4990625)))
    assert not proof.passes(result, GraphOptions(min_agreement=0.9991))
    assert not proof.passes(result, GraphOptions(max_miou_drop=0.09))
    assert not proof.passes({**result, "finite": False}, GraphOptions())


def test_nan_which_agrees_with_anything_proves_nothing(picture):
    zeros, nan = np.zeros(SIZE, np.uint8), np.full((2, *SIZE), np.nan, np.float32)
    with pytest.raises(UserError, match=r"0.png: the trained model's own probabilities are NaN"):
        proof.compare(Fixed(zeros, nan), lambda *_: pytest.fail("it was asked"), [picture], 2, 255)
    fine = np.full((2, *SIZE), 0.5, np.float32)
    answers = iter([nan, fine])  # of the first of two pictures alone
    result = proof.compare(Fixed(zeros, fine), lambda *_: (zeros, next(answers), [1.0, 1.0]), [picture] * 2, 2, 255)
    assert result["agreement"] == 1 and result["largest_difference_of_probabilities"] is None
    assert not proof.passes(result, GraphOptions())


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (
            "exec sleep 9",
            "returns no result for 0.png: no answer within 0 s; PyTorch took 0.0 s. Choose another export.opset",
        ),
        ("read line; kill -9 $$", "killed by signal 9 .Killed., as when memory runs out; it ended without a message"),
        ("echo it is broken >&2; exit 1", "returns no result for 0.png: it is broken. Choose"),
        ("printf 12345678; exec sleep 9", "it ended without a message"),
        ("printf '\\004\\0\\0\\0\\0\\0\\0\\0none'; exec sleep 9", "it ended without a message"),
    ],
)
def test_a_process_that_hangs_dies_or_talks_nonsense_is_told_of(picture, tmp_path, monkeypatch, command, reason):
    monkeypatch.setattr(proof, "MIN_LIMIT", 0.3)
    monkeypatch.setattr(proof, "_LAST_WORDS", 0.1)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        open(tmp_path / "log", "w+b") as log,
        subprocess.Popen(["/bin/sh", "-c", command], stderr=log, **pipes) as process,
    ):
        ask = proof.Exported(process, tmp_path / "model.onnx", log)
        with pytest.raises(UserError, match=reason):
            ask(picture.path, 1, 0.0)
        process.kill()


def test_the_limit_grows_with_what_pytorch_takes(picture, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(proof, "Timer", lambda limit, end: limits.append(limit) or Timer(limit, end))
    with (
        open(tmp_path / "log", "w+b") as log,
        subprocess.Popen(["/bin/false"], stderr=log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        pytest.raises(UserError, match="it ended without a message"),
    ):
        proof.Exported(process, tmp_path / "model.onnx", log)(picture.path, 1, 7.0)
    assert limits == [300 + 50 * 7]


def test_modules_of_the_working_folder_are_not_those_that_answer(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "dinoseg.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    record = SimpleNamespace(plain=lambda: {})
    with (
        proof.exported("onnx", tmp_path / "none.onnx", record) as ask,
        pytest.raises(UserError, match="none.onnx"),
    ):
        try:
            ask(tmp_path / "0.png", 1, 0.0)
        except UserError as error:
            assert "stranger" not in str(error)
            raise


def test_what_a_library_prints_is_no_answer(tmp_path, monkeypatch, picture):
    code = f"""if True:
        import os, sys
        from types import SimpleNamespace
        import numpy as np
        from dinoseg.export import answers
        os.write(1, b"")
        def runtime(*_):
            os.write(1, b"printed by a library")
            shape = {SIZE}
            return SimpleNamespace(ids=lambda _: np.zeros((1, *shape), np.uint8),
                                   probabilities=lambda _: np.zeros((1, 2, *shape), np.float32))
        answers._onnx = runtime
        answers.answer("onnx", "", 1, "")
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        open(tmp_path / "log", "w+b") as log,
        subprocess.Popen([sys.executable, "-c", code], stderr=log, **pipes) as process,
    ):
        ids, probabilities, seconds = proof.Exported(process, tmp_path, log)(picture.path, 3, 0.0)
        process.kill()
    assert ids.shape == SIZE and probabilities.shape == (2, *SIZE) and len(seconds) == 3


def test_large_probabilities_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(answers, "MAX", 100)
    values = np.arange(2 * 20 * 30, dtype=np.float32).reshape(2, 20, 30)
    thin = answers.thinned(values)
    assert thin.size <= 100 and (thin == values[:, ::4, ::4]).all()
    assert answers.thinned(values[:, :5, :5]).shape == (2, 5, 5)

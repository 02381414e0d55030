"""mode=track with a trained model: a segmenter's masks smoothed over time, or its slots."""

import csv
import json

import numpy as np
import pytest
from command_line import call

from dinoseg.utils.images import read_ids


def run(where, *arguments):
    done = call(where, *arguments)
    assert done.status == 0, done.err
    return done


def track(where, out, *more):
    common = ("mode=track", "input=clip", "engine=cpu", "engine.precision=fp32", f"hydra.run.dir={out}")
    return run(where, *common, *more)


def masks(folder):
    return np.stack([read_ids(path) for path in sorted((folder / "masks").glob("*.png"))])


def test_a_segmenter_is_smoothed(trained):
    track(trained, "own", "resume=segmenter", "mode.smoothing=0")
    done = track(trained, "smooth", "resume=segmenter", "mode.smoothing=0.8", "tracker.context=2")
    run(
        trained,
        "mode=predict",
        "resume=segmenter",
        "input=clip",
        "engine=cpu",
        "engine.precision=fp32",
        "hydra.run.dir=p",
    )
    predicted = [np.load(path) for path in sorted((trained / "p").glob("*/segmentation_raw.npy"))]
    own, smooth = masks(trained / "own"), masks(trained / "smooth")
    np.testing.assert_array_equal(own, predicted)
    assert smooth.shape == own.shape and (smooth != own).any()
    shares = [float(np.mean(stack[1:] != stack[:-1])) for stack in (own, smooth)]
    flicker = json.loads((trained / "smooth/track.json").read_text())["flicker"]
    assert [flicker["before"], flicker["after"]] == pytest.approx(shares)
    assert f"{100 * shares[0]:.2f} %, smoothed {100 * shares[1]:.2f} %" in done.err
    with open(trained / "smooth/objects.csv", encoding="utf-8", newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == {str(label) for label in np.unique(smooth)}


def test_slots_are_followed_with_and_without_a_first_mask(trained):
    track(trained, "free", "resume=slots")
    free = masks(trained / "free")
    assert set(np.unique(free)) <= {1, 2, 3} and free.shape == (7, 32, 32)
    track(trained, "given", "resume=slots", "labels=first.png", "slots=lock_on", "slots.background_slots=2")
    given, first = masks(trained / "given"), read_ids(trained / "first.png")
    assert set(np.unique(given)) <= set(np.unique(first)) and len(np.unique(given)) > 1
    assert (trained / "given/overlay.mp4").is_file()


def test_slots_are_no_classes_to_predict(trained):
    done = call(trained, "mode=predict", "resume=slots", "input=clip", "engine=cpu")
    assert done.status == 1 and "Traceback" not in done.err
    assert "resume=slots/checkpoints/best.safetensors is a slot model" in done.err and "mode=track" in done.err


def test_unsupported_options_of_a_trained_model_are_refused(trained):
    for more, message in (
        (("resume=segmenter", "labels=first.png"), "labels"),
        (("resume=segmenter", "mode.smoothing=1.5"), "mode.smoothing=1.5 is out of range. Give a number from 0 to 1"),
        (("resume=slots", "slots.temperature=0"), "slots.temperature=0"),
        (("resume=slots", "slots=lock_on"), "slots.lock_on=true creates slots from the first frame"),
    ):
        done = call(trained, "mode=track", "input=clip", "engine=cpu", *more)
        assert done.status == 1 and message in done.err and "Traceback" not in done.err, done.err

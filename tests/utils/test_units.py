"""Finished units: taken over, made anew or refused; and the forms in which they lie on disk."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from dinoseg.extensions.packed.store import StoreKey, open_store
from dinoseg.extensions.prepare.sarrarp import VideoJob, _done_before
from dinoseg.extensions.tracking.video.state import STATE, TrackProgress, read_track_state
from dinoseg.utils import forms
from dinoseg.utils.units import read_valid_note

ITEM, CRC = bytes([1, 2, 3, 4]), 158664065  # an image and a mask of one pixel; of `a (1, 1, 3) 1` and these bytes
KEY = '{"fingerprint": "f", "longest": null, "version": 4}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, []),
        ('{"made_of": 1}', []),
        ('{"made_of": 2}', ["it is made anew"]),
        ('{"made_of": "x"}', ["it.made_of is 'x'"]),
        ('{"made_of": 1', ["is damaged (Expecting"]),
    ],
)
def test_unit_is_reused_or_rebuilt_with_a_reason(tmp_path, caplog, text, said):
    note = tmp_path / "100%s.json"
    form = forms.record(made_of=forms.whole())
    if text is not None:
        note.write_text(text)
    content = read_valid_note(
        note,
        lambda path: forms.read_json(path, form),
        lambda content: content["made_of"] == 1,
        damaged="%s is damaged (%s)",
        unfit="100%s: it is made anew",
    )
    assert content == ({"made_of": 1} if text == '{"made_of": 1}' else None)
    assert len(caplog.records) == len(said) and all(words in caplog.text for words in said)
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_unit_that_lacks_a_file_is_not_finished(tmp_path, caplog):
    (tmp_path / "note").write_text("x")
    whole = (tmp_path / "note", lambda path: path.read_text(), lambda _: (tmp_path / "gone").stat().st_size > 0)
    assert read_valid_note(*whole, damaged="%s %s", unfit="unfit") is None and not caplog.records


def test_unreadable_note_is_reported_and_its_unit_rebuilt(tmp_path, caplog):
    (tmp_path / "note").mkdir()
    assert read_valid_note(tmp_path / "note", lambda path: path.read_text(), damaged="%s cannot be read (%s)") is None
    assert f"{tmp_path / 'note'} cannot be read ([Errno " in caplog.text


def test_a_store_is_read(tmp_path):
    (tmp_path / "pixels.bin").write_bytes(ITEM)
    (tmp_path / "index.json").write_text(f'{{"key": {KEY}, "names": ["a"], "places": [[0, 1, 1, {CRC}, 3, 1, 0]]}}')
    store = open_store(tmp_path, StoreKey("f", None), ["a"])
    assert store is not None and store.read(0)[0].tolist() == [[[1, 2, 3]]]
    assert open_store(tmp_path, StoreKey("g", None), ["a"]) is None
    (tmp_path / "pixels.bin").unlink()
    assert open_store(tmp_path, StoreKey("f", None), ["a"]) is None


def test_a_video_prepared_before_is_not_extracted_again(tmp_path):
    for name in ("rgb/000000000.png", "rgb/000000060.png", "segmentation/000000000.png", "segmentation/000000060.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".prepared.json").write_text('{"rate": 1, "decoded": 61, "frames": 2, "masks": 2}')
    job = VideoJob(tmp_path, None)
    assert _done_before(job, 1) == {"rate": 1, "decoded": 61, "frames": 2, "masks": 2} and _done_before(job, 10) is None
    (tmp_path / ".prepared.json").write_text('{"rate": 10, "decoded": 61, "frames": 1, "masks": 2}')
    (tmp_path / "segmentation/000000120.png").touch()
    assert _done_before(job, 1) is None
    (tmp_path / "segmentation/000000120.png").unlink()
    assert _done_before(job, 1) is not None  # more than is asked for, and a frame of another's beside
    (tmp_path / ".prepared.json").write_text('{"rate": 1, "decoded": 61, "frames": 2, "masks": 2}')
    (tmp_path / "rgb/000000060.png").unlink()
    assert _done_before(job, 1) is None


def test_track_state_is_read(tmp_path):
    header = (
        '{"format": 1, "progress": {"done": 4, "frames": "ab", "labels": "cd", "batch_size": 2}, '
        '"settings": {"kind": "propagation", "tracker": {"radius": 12, "short": null}}}'
    )
    save_file({"first": torch.ones(2)}, tmp_path / STATE, {"track": header})
    standing = read_track_state(tmp_path)
    assert standing.progress == TrackProgress(4, "ab", "cd", 2) and standing.tensors["first"].tolist() == [1, 1]
    assert standing.settings == {"kind": "propagation", "tracker": {"radius": 12, "short": None}}

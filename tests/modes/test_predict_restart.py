"""mode=predict given twice with one folder: it goes on there, alone, and only by the same settings."""

import fcntl
import json
import shutil
from unittest.mock import patch

from command_line import call

from dinoseg.modes import predict


def test_repeated_command_resumes_in_its_folder(trained_once, tmp_path):
    words = ("mode=predict", f"resume={trained_once}/segmenter", f"input={trained_once}/clip", "engine=cpu")
    words += ("hydra.run.dir=out",)
    first = call(tmp_path, *words)
    assert first.status == 0, first.err
    for name in ("00000_segmentation", "of_nobody"):
        (tmp_path / f"out/.{name}.1.part").mkdir()
    for folder in ("masks", "predicted"):
        (tmp_path / f"out/{folder}/.00000.png.1.part").touch()
    (tmp_path / "out/predicted/00003.json").unlink()
    again = call(tmp_path, *words)
    assert again.status == 0 and "6 images of an earlier run reused" in again.err + again.out, again.err
    assert "images: 1 image in" in again.err + again.out
    assert not list((tmp_path / "out").rglob(".*.part")) and not (tmp_path / "out_2").exists()
    other = call(tmp_path, *words, "mode.opacity=0.25")
    assert other.status == 1 and "mode.opacity was 0.5 and is 0.25" in other.err
    with open(tmp_path / "out/run.log", "a", encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        busy = call(tmp_path, *words)
    assert busy.status == 1 and "Another process is writing to" in busy.err
    assert "Wait for it, or choose another hydra.run.dir." in busy.err and not (tmp_path / "out_2").exists()


def test_groups_of_an_interrupted_run_are_those_of_its_command(trained_once, tmp_path):
    words = ("mode=predict", f"resume={trained_once}/segmenter", "engine=cpu", "hydra.run.dir=out")

    def groups():
        return json.loads((tmp_path / "out/masks/classes.json").read_text())["groups"]

    one, two = (f"input={trained_once}/clip/0000{number}.png" for number in (1, 2))
    assert call(tmp_path, *words, one, "data.group=^0").status == 0 and groups() == {"00001": "0"}
    with patch.object(predict, "_segment_videos", side_effect=KeyboardInterrupt):  # after the masks of images
        assert call(tmp_path, *words, two, "data.group=.$").status != 0
    assert (tmp_path / "out/masks/00002.png").is_file() and groups() == {"00001": "0", "00002": "2"}
    assert call(tmp_path, *words, one).status == 0 and groups() == {"00002": "2"}


def test_other_model_is_refused_in_one_sentence(trained_once, tmp_path):
    (tmp_path / "one").symlink_to(trained_once / "segmenter")
    shutil.copytree(trained_once / "segmenter/checkpoints", tmp_path / "two/checkpoints")
    words = ("mode=predict", f"input={trained_once}/clip/00000.png", "engine=cpu", "hydra.run.dir=out")
    assert call(tmp_path, *words, "resume=one/checkpoints/best.safetensors").status == 0
    same = call(tmp_path, *words, f"resume={trained_once}/segmenter/checkpoints/best.safetensors")
    assert same.status == 0 and "1 image of an earlier run reused" in same.err + same.out
    other = call(tmp_path, *words, "resume=two/checkpoints/best.safetensors")
    assert other.status == 1 and "/out holds predictions of another model: it was /" in other.err
    assert "best.safetensors, and is two/checkpoints/best.safetensors. Use that model again to resume" in other.err
    assert other.err.count("error: ") == 1 and "stamp" not in other.err

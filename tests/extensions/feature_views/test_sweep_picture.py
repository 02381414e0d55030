import json

import numpy as np
from command_line import TINY, call
from making import save, write_video
from PIL import Image

from dinoseg.extensions.feature_views.sweep_picture import draw_sweep

IMAGE, RED, GREEN, BLUE, PINK = (9, 8, 7), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)


def write_run(folder, names, *panels):
    """Write what mode=features leaves of inputs: pictures of panels of one colour each, and the summary."""
    figures = {"cosine": 1.0} if len(panels) == 4 else {}
    for name in names:
        save(folder / f"{name}_features.png", np.array(panels).repeat(4, 0)[None].repeat(6, 0))
    (folder / "summary.json").write_text(json.dumps({"inputs": dict.fromkeys(names, figures)}))
    return folder


def colours(path):
    return {tuple(pixel) for pixel in np.asarray(Image.open(path)).reshape(-1, 3).tolist()}


def test_jobs_are_side_by_side(tmp_path, capsys):
    names = [f"image{number}" for number in range(7)]
    jobs = [
        ({"backbone": "a"}, write_run(tmp_path / "0", names, IMAGE, RED)),
        ({"backbone": "b"}, write_run(tmp_path / "1", names[1:], IMAGE, GREEN, BLUE, PINK)),
    ]
    draw_sweep(tmp_path, jobs)
    found = colours(tmp_path / "features.png")
    assert {IMAGE, RED, BLUE} <= found and not {GREEN, PINK} & found
    assert f"{tmp_path}/features.png, 5 of 6 inputs" in capsys.readouterr().out


def test_without_a_common_image_there_is_no_picture(tmp_path):
    runs = [write_run(tmp_path / name, [name], IMAGE, RED) for name in ("a", "b")]
    again = write_run(tmp_path / "again", ["a"], IMAGE, RED)
    draw_sweep(tmp_path, [])
    draw_sweep(tmp_path, [({}, runs[0])])
    draw_sweep(tmp_path, [({"backbone": "a"}, runs[0]), ({"backbone": "b"}, runs[1])])
    draw_sweep(tmp_path, [({"input": "one/a.png"}, runs[0]), ({"input": "two/a.png"}, again)])
    assert not (tmp_path / "features.png").exists()


def test_a_sweep_ends_with_a_picture_of_its_jobs(tmp_path):
    save(tmp_path / "in/a.png", np.random.default_rng(0).integers(0, 256, (24, 40, 3)))
    write_video(tmp_path / "in/b.avi", 2)
    words = ("mode=features", "engine=cpu", *TINY, "input=in", "mode.layer=0,-1,9", "hydra.sweep.dir=swept")
    done = call(tmp_path, "-m", *words)
    assert done.status == 1 and "layers=[9]" in done.err and "side by side: swept/features.png" in done.out
    of_jobs = [colours(tmp_path / f"swept/{number}/a_features.png") for number in (0, 1)]
    assert set.union(*of_jobs) <= colours(tmp_path / "swept/features.png") and of_jobs[0] != of_jobs[1]

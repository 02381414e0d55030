"""The faulty conversion of IDD's labels: it can be trained on, it warns, and it is never scored as IDD."""

import numpy as np
import pytest
from command_line import SMALL, call
from making import save

OVERRIDES = [word for word in SMALL if not word.startswith(("data=", "data.classes=", "data.root="))]
IDS = (1, 2, 4, 5, 9, 25, 26, 255)  # neither 0, road, nor 3, rail track


@pytest.fixture
def root(tmp_path):
    draw = np.random.default_rng(1)
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            stem = f"{split}/{split}_{number}/frame"
            save(tmp_path / f"idd/leftImg8bit/{stem}_leftImg8bit.png", draw.integers(0, 256, (32, 48, 3)))
            save(tmp_path / f"idd/gtFine/{stem}_gtFine_labelIds.png", draw.choice(IDS, (32, 48)))
    return tmp_path / "idd"


def test_home_made_idd_trains_with_a_warning(root, tmp_path):
    done = call(tmp_path, "mode=train", *OVERRIDES, "data=idd_home_made", f"data.root={root}", "trainer.val_every=2")
    assert done.status == 0, done.err
    assert "data=idd_home_made trains on a custom remap: 255 is void in IDD but road here, and" in done.err
    assert "these labels look home-made or remapped" in done.err
    (run,) = (tmp_path / "outputs/base").glob("train_*")
    assert list(run.rglob("scores.json"))
    done = call(tmp_path, "mode=eval", f"resume={run}", "engine=cpu")
    assert done.status == 0 and "official" not in done.out, done.err
    assert not list(tmp_path.rglob("official_scores.json"))


def test_the_same_files_under_another_name_still_stop(root, tmp_path):
    for path in root.rglob("*_gtFine_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labellevel3Ids")))
    done = call(
        tmp_path,
        *("mode=train", *OVERRIDES, "data=idd", f"data.root={root}"),
        "data.reader.masks.ids={26: 255}",
    )
    assert done.status == 1 and "look home-made or remapped" in done.err

"""mode=render: write the embedded data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoseg.data.synthetic.write import render_dataset
from dinoseg.errors import UserError


def render(
    cfg: Any,
    *,
    out_dir: Path,
    root: str | None,
    train_videos: int,
    test_videos: int,
    seconds: int,
    size: Sequence[int],
    seed: int,
    workers: int,
) -> None:
    """Write rendered operations under `root`, in the form in which SAR-RARP50 is downloaded.

    `size` is (height, width) in pixels.

    Raises:
        UserError: a setting is out of range, or `root` cannot be written or holds other data.
    """
    if not root:
        raise UserError("mode=render needs a folder to write to: give data.root=<folder>.")
    if len(size) != 2:
        raise UserError(f"mode.size={list(size)} must be two numbers [height, width], for example [192, 320].")
    render_dataset(
        Path(root),
        train_videos=train_videos,
        test_videos=test_videos,
        seconds=seconds,
        size=(size[0], size[1]),
        seed=seed,
        workers=workers,
    )
    print(
        f"Wrote {train_videos} training and {test_videos} test videos of {seconds} s at "
        f"{size[0]} x {size[1]} under {root}"
    )
    print(f"Next: python -m dinoseg mode=prepare data=sarrarp data.root={root}")

"""mode=render: rendering of a synthetic dataset, to try and measure everything without a download."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.nodes import instantiate, not_set
from dinoseg.config.plain import to_container
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural

VIDEOS = {"train_videos": "training", "val_videos": "validation", "test_videos": "test"}


def render(
    cfg: DictConfig,
    *,
    out_dir: Path,
    train_videos: Natural | None,
    val_videos: Natural | None,
    test_videos: Natural | None,
    seconds: Count | None,
    size: Sequence[int] | None,
    seed: Natural,
    workers: Count,
) -> None:
    """Render the synthetic dataset that `cfg.data.render` configures, under `cfg.data.root`.

    Arguments that are None have the value of that node. `size` is (height, width) in pixels.

    Raises:
        UserError: the dataset cannot be rendered; a setting does not apply to it or is out of range; or the root is not
            writable or holds other data.
    """
    node, data = cfg.data.render, cfg.choices.data
    if node is None:
        raise UserError(
            f"data={data} cannot be rendered. Choose data=sarrarp for operations, or data=movi for moving objects."
        )
    wanted: dict[str, Any] = {"train_videos": train_videos, "val_videos": val_videos, "test_videos": test_videos}
    wanted |= {"seconds": seconds, "size": size}
    changes = {key: value for key, value in wanted.items() if value is not None}
    for key in changes.keys() - node.keys():
        known = ", ".join(f"mode.{each}" for each in wanted if each in node)
        raise UserError(f"mode.{key}={changes[key]}: it has no effect with data={data}. Leave it out, or set {known}.")
    if OmegaConf.is_missing(cfg.data, "root"):
        raise UserError(not_set("data.root"))
    if not cfg.data.root:
        raise UserError("mode=render needs a folder to write to: give data.root=<folder>.")
    draw = instantiate(node, instead={**changes, "seed": seed, "workers": workers})
    made = to_container(node, resolve=True) | changes
    if len(made["size"]) != 2:
        raise UserError(f"mode.size={made['size']} must be two numbers [height, width], for example [192, 320].")
    draw()
    videos = " and ".join(f"{made[key]} {name}" for key, name in VIDEOS.items() if made.get(key))
    height, width = made["size"]
    print(f"Wrote {videos} videos of {made['seconds']} s at {height} x {width} under {cfg.data.root}")
    step = "train hparam=slots_rendered" if cfg.data.prepare is None else f"prepare data={data}"
    print(f"Next: python -m dinoseg mode={step} data.root={cfg.data.root}")

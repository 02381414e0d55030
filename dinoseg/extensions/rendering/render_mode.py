"""mode=render: rendering of a synthetic dataset, to try and measure everything without a download."""

import shlex
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.composition import SHIPPED
from dinoseg.config.nodes import instantiate, not_set
from dinoseg.config.options import options_in
from dinoseg.config.plain import to_container
from dinoseg.utils.errors import UserError

VIDEOS = {"train_videos": "training", "val_videos": "validation", "test_videos": "test"}


def render(cfg: DictConfig, *, out_dir: Path) -> None:
    """Render the synthetic dataset that the group `render` configures, under `cfg.data.root`.

    Raises:
        UserError: the dataset cannot be rendered; a setting is out of range; or the root is not writable or holds other
            data.
    """
    data = cfg.choices.data
    if "render" not in cfg:
        raise UserError(
            f"data={data} cannot be rendered. Choose data=sarrarp for operations, or data=movi for moving objects."
        )
    if OmegaConf.is_missing(cfg.data, "root"):
        raise not_set("data.root")
    if not cfg.data.root:
        raise UserError("mode=render needs a folder to write to: give data.root=<folder>.")
    settings = to_container(cfg.render, resolve=True)
    if len(settings["size"]) != 2:
        raise UserError(f"render.size={settings['size']} must be two numbers [height, width], for example [192, 320].")
    instantiate(cfg.render)()
    videos = " and ".join(f"{settings[key]} {name}" for key, name in VIDEOS.items() if settings.get(key))
    folders = [SHIPPED, *map(Path, cfg.get("config_dirs", ()))]
    height, width = settings["size"]
    print(f"Wrote {videos} videos of {settings['seconds']} s at {height} x {width} under {cfg.data.root}")
    step = f"prepare data={data}" if data in options_in(folders, "prepare") else "train hparam=slots_rendered"
    print(f"Next: python -m dinoseg mode={step} {shlex.quote(f'data.root={cfg.data.root}')}")

"""Where the parts that older checkpoints and config files name are today.

A part that moves gets a line here, and nothing else: checkpoints are read by these names (`runs/recipe.py`), config
files of the user's are (`registry.py`), and so is whatever is built (`nodes.py`).
"""

from collections.abc import Mapping
from typing import Any

TARGETS = {  # a full name of before to today's, where the name itself is another
    "dinoseg.heads.multiscale.multiscale_head": "dinoseg.heads.linear.LinearHead",
    "dinoseg.inference.tracking_settings.Settings": "dinoseg.tracking.propagation.settings.PropagationSettings",
    "dinoseg.data.folder.Layout": "dinoseg.data.formats.folder.FolderLayout",
}
MODULES = {  # a module's name of before to today's
    "dinoseg.data.clip_davis": "dinoseg.data.formats.davis",
    "dinoseg.data.clip_folder": "dinoseg.data.formats.video_folder",
    "dinoseg.data.clip_movi": "dinoseg.data.formats.movi",
    "dinoseg.data.clip_pairs": "dinoseg.data.clips.foreground",
    "dinoseg.data.clip_view": "dinoseg.data.clips.view",
    "dinoseg.data.clip_youtube_vos": "dinoseg.data.formats.youtube_vos",
    "dinoseg.data.clips": "dinoseg.data.clips.cut",
    "dinoseg.data.folder": "dinoseg.data.formats.folder",
    "dinoseg.data.frequencies": "dinoseg.data.scan.class_counts",
    "dinoseg.data.idd": "dinoseg.data.formats.idd",
    "dinoseg.data.masks": "dinoseg.data.classes.masks",
    "dinoseg.data.prepare_idd": "dinoseg.preparation.idd",
    "dinoseg.data.prepare_sarrarp": "dinoseg.preparation.sarrarp",
    "dinoseg.data.sarrarp": "dinoseg.data.formats.sarrarp",
    "dinoseg.data.synthetic.moving_write": "dinoseg.synthetic.moving.write",
    "dinoseg.data.synthetic.write": "dinoseg.synthetic.surgery.write",
    "dinoseg.inference.slot_settings": "dinoseg.tracking.slots.settings",
    "dinoseg.losses.pixel": "dinoseg.losses.cross_entropy",
    "dinoseg.modes.sweep": "dinoseg.sweeps.table",
}


def today(target: str) -> str:
    """Return a target's name of today; one that has not moved keeps its name."""
    module, dot, name = target.rpartition(".")
    return TARGETS.get(target, f"{MODULES.get(module, module)}{dot}{name}")


def renamed(node: Any) -> Any:
    """Return a plain config with the targets that have moved since it was written under their names of today."""
    if isinstance(node, Mapping):
        return {
            key: today(value) if key == "_target_" and isinstance(value, str) else renamed(value)
            for key, value in node.items()
        }
    return [renamed(value) for value in node] if isinstance(node, list) else node

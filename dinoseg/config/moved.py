"""Where the parts that older checkpoints name are today."""

TARGETS = {  # a full name in older checkpoints to today's, where the name itself is another
    "dinoseg.inference.tracking_settings.Settings": "dinoseg.tracking.propagation.settings.PropagationSettings",
    "dinoseg.data.folder.Layout": "dinoseg.data.formats.folder.FolderLayout",
}
MODULES = {  # a module's name in older checkpoints to today's
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
    "dinoseg.modes.sweep": "dinoseg.sweeps.table",
}


def today(target: str) -> str:
    """Return a target's name of today; one that has not moved keeps its name."""
    module, _, name = target.rpartition(".")
    return TARGETS.get(target, f"{MODULES.get(module, module)}.{name}")

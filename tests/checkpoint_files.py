"""What the least of checkpoints says of itself."""

from dinoseg.training import checkpoint
from dinoseg.training.description import DESCRIBED_GROUPS, GROUPS

INFO = {
    "progress": {},
    "frozen": {},
    "config": {"seed": 0, **{group: {} for group in GROUPS}},
    "choices": dict.fromkeys(DESCRIBED_GROUPS, "x"),
    "targets": {},
    "folder": "x",
    "classes": ["a", "b"],
    "palette": [[0, 0, 0], [255, 255, 255]],
    "ignore_index": 255,
}


def save_progress(run, step):
    """Write the checkpoint of a step, without tensors, into a run folder."""
    progress = {"step": step, "best": 0.5, "best_step": step, "stale": 0, "validation_pending": False}
    checkpoint.write(run / "checkpoints/last.safetensors", {}, {**INFO, "progress": progress})

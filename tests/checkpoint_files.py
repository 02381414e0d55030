"""What the least of checkpoints says of itself."""

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

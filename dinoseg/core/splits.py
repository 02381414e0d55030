"""Names of the splits of a dataset."""

SPLITS = ("train", "val", "test")

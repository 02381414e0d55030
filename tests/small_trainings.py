"""Trainings of a second in the test's own process: striped images, a tiny segmenter, and a loop without a config."""

from types import SimpleNamespace

import numpy as np
import torch
from checkpoint_files import INFO
from log_rows import Rows
from making import Pictures, save
from tiny_parts import tiny_vit

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.adapters import Full
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.training.checkpoint import Checkpointer
from dinoseg.training.engine import Engine
from dinoseg.training.optim import adamw, schedule
from dinoseg.training.trainer import Settings, TrainingSetup, fit

SHORT = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


class Stripes(Pictures):
    """Pictures whose upper half is dark and of class 0, the lower bright and of class 1; the border is ignored."""

    classes = ("dark", "bright", "never")

    def __getitem__(self, index):
        height, width = self.sizes[index]
        draw = np.random.default_rng(index)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 2 :] = 1
        image = (mask[None] * 150 + draw.integers(0, 60, (3, height, width))).astype(np.uint8)
        mask[:, :2] = 255
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "name": self.names[index]}


def write_pairs(folder, sizes):
    """Write pictures of noise with masks of three classes, `0.png` and `0_mask.png`, and open them."""
    pairs = []
    for number, size in enumerate(sizes):
        draw = np.random.default_rng(number)
        image = save(folder / f"{number}.png", draw.integers(0, 256, (*size, 3)))
        mask = save(folder / f"{number}_mask.png", draw.integers(0, 3, size))
        pairs.append(Pair(str(number), image, mask))
    return PairDataset(pairs, Labels(["a", "b", "c"], [(0, 0, 0)] * 3, 255), Masks())


def segmenter(head=None, adapter=Full, **options):
    """Return a segmenter of three classes on a tiny backbone, of the same weights each time."""
    torch.manual_seed(0)
    return SegmentationModel(adapter()(tiny_vit(**options)), head() if head else LinearHead(24, 1, 3))


def train_model(model, data_module, folder, *, start=None, writes=True, log=None, **parts):
    """Train a model with the given or the usual parts; whatever is no part is a setting of the loop.

    Return the progress, the rows of the log, and the parts of the training.
    """
    log = log or Rows()
    engine = parts.pop("engine", None) or Engine("cpu", "fp32", workers=0)
    loss = parts.pop("loss", None) or CrossEntropy(torch.ones(3))
    optimizer = parts.pop("optimizer", None) or adamw(model, lr=parts.pop("lr", 3e-3))
    shape = parts.pop("schedule", None) or schedule()
    checkpoints = parts.pop("checkpoints", None) or Checkpointer(folder, dict(INFO), start, writes)
    settings = Settings(**{"log_every": 1, **parts})
    shared = (model, loss, data_module, optimizer, shape, engine, checkpoints, log, settings)
    progress = fit(TrainingSetup(*shared))
    found = {"model": model, "data_module": data_module, "engine": engine, "loss": loss, "checkpoints": checkpoints}
    return SimpleNamespace(progress=progress, rows=log.rows, **found)


def values_of(rows, name):
    """Return the values of a name in the rows that have one."""
    return [row[name] for row in rows if name in row]


def without_timings(rows):
    """Return the rows without what tells of the machine."""
    timed = {"train/images_per_s", "train/data_wait", "train/memory_gib", "time"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]

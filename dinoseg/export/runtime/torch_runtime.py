"""Inference with torch: load a file, a checkpoint or a run folder without a command line."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoseg.config.nodes import instantiate
from dinoseg.config.resolvers import lent_resolvers
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.resume import standalone_config
from dinoseg.experiment.trained import restore
from dinoseg.export.runtime.facts import ModelFacts
from dinoseg.export.runtime.runtime import Opened, Options
from dinoseg.inference.policy import Policy
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.training import checkpoint
from dinoseg.training.engine import choose_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.precision import compute_dtype

_HELD = (None, "random")  # config values for weights that the checkpoint itself holds


class TorchRuntime:
    """The `Runtime` of torch: a predictor with numpy results."""

    name = "torch"

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def ids(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class ids (B, H, W) uint8 of images (H, W, 3) uint8 RGB of one size."""
        return self.predictor.ids(images)

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the class probabilities (B, K, H, W) float32 of images (H, W, 3) uint8 RGB of one size."""
        return self.predictor.probabilities(images).cpu().numpy()


def load_torch(path: Path, options: Options) -> Opened:
    """Load the model of an existing file, checkpoint or run folder.

    Raises:
        UserError: in the terms of a command line with the file as `resume`.
    """
    chosen = choose_device(options.device)
    dtype = compute_dtype(options.precision, chosen)
    file = checkpoint.find(path, "best")
    # restore the caller's OmegaConf resolvers and random state afterwards
    with lent_resolvers(), torch.random.fork_rng(_devices(chosen)):
        info = checkpoint.describe(file)
        facts = ModelFacts.of(info, str(file))
        changes = {"engine.device": options.device, **_weights(file, info, options)}
        cfg = standalone_config(file, _drop_task(info), changes, inference=options.inference, trust=options.trust)
        policy: Policy = instantiate(cfg.inference)
        sizes = TrainedSizes.from_info(info)
        model, _ = restore(ModelBuilder(cfg), file)
    if model.head.slots is not None:
        raise UserError(f"{file} is a slot model, which has no classes. mode=track tracks its segments.")
    limit_to_trained_size(model, sizes)
    context = nullcontext if dtype == torch.float32 else partial(torch.autocast, chosen.type, dtype)
    predictor = Predictor(model.to(chosen), chosen, context, policy)
    return Opened(TorchRuntime(predictor), facts, file if "facts" in info else None)


def _drop_task(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description without its training task: a check of its keys would import scipy and matplotlib."""
    config = info["config"]
    return {**info, "config": {**config, "trainer": {**config["trainer"], "task": None}}}


def _weights(file: Path, info: Mapping[str, Any], options: Options) -> dict[str, str]:
    """Return config overrides for weights that are given instead of those that the file names.

    Raises:
        UserError: if the file names none, since it holds them.
    """
    changes = {}
    for part, path in (("backbone", options.backbone), ("head", options.head)):
        if path is None:
            continue
        if info["config"][part].get("weights") in _HELD:
            raise UserError(f"{part}.weights={path}: {file} holds its own {part}. Leave it out.")
        changes[f"{part}.weights"] = str(path)
    return changes


def _devices(device: torch.device) -> list[int]:
    return list(range(torch.cuda.device_count())) if device.type == "cuda" else []

"""Runs that tests train by a command line, and what these leave."""

import json
from contextlib import chdir
from unittest.mock import patch

from command_line import succeed
from omegaconf import OmegaConf

from dinoseg.cli import ranks
from dinoseg.config.plain import to_container
from dinoseg.modes.train import train
from dinoseg.training import checkpoint
from dinoseg.training.engine import Engine


def train_run(folder, run, *words):
    """Train into a run folder, and return the tensors of its last checkpoint and what the command said."""
    done = succeed(folder, *words, f"hydra.run.dir={run}")
    return checkpoint.read(folder / run / "checkpoints/last.safetensors").tensors, done


def rows(folder, run):
    """Return the rows of a run's log."""
    return [json.loads(row) for row in (folder / run / "metrics.jsonl").read_text().splitlines()]


def train_in_rank(cfg, *, out_dir):
    """Stand for a mode that trains several configs one after another, so that ranks start once for all of them."""
    with patch.object(Engine, "close"):  # the next training meets in the same group
        for name, each in to_container(cfg)["trainings"]:  # each points to keys from its own root
            train(OmegaConf.create(each), out_dir=out_dir / name, metrics_only=True, report=False, pictures=0)


def whole_and_resumed_on_ranks(folder, compose, words):
    """Return the tensors of a training on two ranks, and of one that is stopped after a step and resumed."""
    with chdir(folder):
        whole = compose(*words)
        first, rest = whole.copy(), whole.copy()
        first.trainer.steps = 1
        rest.resume = str(folder / "resumed_on_ranks/checkpoints/last.safetensors")
        mode = {"_target_": "finished_runs.train_in_rank", "_partial_": True, "keeps_folder": False}
        runs = {"whole_on_ranks": [whole], "resumed_on_ranks": [first, rest]}
        trainings = [[name, to_container(cfg)] for name, cfgs in runs.items() for cfg in cfgs]
        job = {"mode": mode, "choices": {"mode": "test"}, "trainings": trainings}
        ranks.run_ranks(OmegaConf.create(job), folder, 2)
    names = ("whole_on_ranks", "resumed_on_ranks")
    return [checkpoint.read(folder / name / "checkpoints/last.safetensors").tensors for name in names]

"""Runs that tests train by a command line, and what these leave."""

import json

from command_line import call

from dinoseg.training import checkpoint


def trained(folder, run, *words):
    """Train into a run folder, and return the tensors of its last checkpoint and what the command said."""
    done = call(folder, *words, f"hydra.run.dir={run}")
    assert done.status == 0, done.err
    return checkpoint.read(folder / run / "checkpoints/last.safetensors").tensors, done


def rows(folder, run):
    """Return the rows of a run's log."""
    return [json.loads(row) for row in (folder / run / "metrics.jsonl").read_text().splitlines()]

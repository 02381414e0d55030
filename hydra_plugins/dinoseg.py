"""What dinoseg adds to Hydra, which takes sweepers from this name space alone; imported at every start."""

from dinoseg.extensions.sweeps.search import Search


class OptunaSweeper(Search):
    """The target of hydra/sweeper=optuna."""

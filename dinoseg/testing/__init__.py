"""Checks that a backbone, head, loss, metric or dataset of your own keeps its contract, for tests."""

from dinoseg.testing.backbones import check_backbone
from dinoseg.testing.datasets import check_dataset
from dinoseg.testing.heads import check_head
from dinoseg.testing.losses import check_loss
from dinoseg.testing.metrics import check_metric

__all__ = ["check_backbone", "check_dataset", "check_head", "check_loss", "check_metric"]

"""Warnings of keys whose effect depends on the checkpoint or adapter: a mode composes no others without effect."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from dinoseg.config.plain import is_below
from dinoseg.core.contracts import Backbone
from dinoseg.runs.folder import last_command_line
from dinoseg.utils.wording import join_names, printable

logger = logging.getLogger(__name__)


def warn_unread(out_dir: Path, unread: Collection[str], reason: str) -> None:
    """Warn once of typed groups or keys without effect; settings of a recipe for other modes are no mistake.

    Args:
        out_dir: the run folder, which stores its command line.
        unread: groups such as `tracker`, with all of their keys, and keys such as `tracker.short_side`.
        reason: sentence on who does not read them.
    """
    idle = [word for word in last_command_line(out_dir) if is_below(_key(word), unread)]
    if idle:
        logger.warning("No effect here: %s. %s", printable(join_names(idle)), reason)


def warn_of_unused_channels(backbone: Backbone, channel_weights: Sequence[float] | None, adapter: str) -> None:
    """Warn of channels whose input kernel is 0 and is not trained, so that the model never uses them.

    Args:
        backbone: with its adapter.
        channel_weights: factor of each channel's input kernel, if the backbone takes them.
        adapter: option of the adapter.
    """
    kernel = next((part.weight for part in backbone.modules() if isinstance(part, nn.Conv2d)), None)
    if 0 in (channel_weights or []) and kernel is not None and not kernel.requires_grad:
        logger.warning(
            "backbone.channel_weights=%s: channels of weight 0 have no effect, since adapter=%s does not train the "
            "input kernel. Choose adapter=full, or another weight.",
            channel_weights,
            adapter,
        )


def _key(word: str) -> str:
    return word.lstrip("+~").split("=")[0].replace("/", ".")  # a nested group fills the key of its path

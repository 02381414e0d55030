"""The cells of a sweep, put together without weights, data or training: what does not fit is known in seconds."""

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from dinoseg.config.job import job_config
from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import plain
from dinoseg.utils.errors import UserError


def impossible_cells(config: DictConfig) -> tuple[list[tuple[str, str]], int]:
    """Return the swept values of each cell that cannot work with the reason, and how many cells there are.

    Only modes whose config names a `check` are looked at, and not what goes on from a checkpoint, whose config is
    merged later. Mistakes that are no UserError are left to the job, which shows where they come from.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)  # which finds what a glob() stands for
    overrides = parser.parse_overrides(plain(config.hydra.overrides)["task"])  # as typed, `${hydra:...}` too
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    cells = [cell for batch in BasicSweeper.split_arguments(overrides, None) for cell in batch]
    bad = []
    for cell in cells:
        if reason := _fault(loader, config, cell):
            named = " ".join(word for word in cell if word.partition("=")[0] in swept)
            bad.append((named or "each", reason))
    return bad, len(cells)


def _fault(loader: ConfigLoader, config: DictConfig, cell: list[str]) -> str:
    """Return what is wrong with a cell; empty where nothing is found."""
    try:
        composed = loader.load_sweep_config(config, cell)
        cfg = job_config(composed, composed.hydra.runtime.choices)
        if cfg.resume is None and "check" in cfg.mode:
            from dinoseg.experiment.heads import own_runs  # imports torch: mode=score does without

            alone = [own.cfg for own in own_runs(cfg, cell, None).values()]
            for job in alone or [cfg]:
                instantiate(cfg.mode.check)(job)
    except UserError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - found again: by the job, with its traceback, or by Hydra, before the first job
        return ""
    return ""

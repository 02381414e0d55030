"""Second composition of a command line, with a recipe that is chosen after the data were examined."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dinoseg.config.job import job_config

_SEARCHED = "hydra.searchpath"


def typed_keys(words: Sequence[str]) -> frozenset[str]:
    """Return the keys and groups that the words of a command line set."""
    return frozenset(each.key_or_group for each in OverridesParser.create().parse_overrides(list(words)))


def user_folders() -> list[str]:
    """Return the folder that `--config-dir` names, as a list; empty if it is not given."""
    return [each.path for each in HydraConfig.get().runtime.config_sources if each.provider == "command-line"]


def searching(folders: Sequence[str]) -> str:
    """Return the override that adds folders, of any name, to Hydra's search path for configs."""
    quoted = ["'" + folder.replace("'", "\\'") + "'" for folder in folders]
    return f"{_SEARCHED}=[{','.join(quoted)}]"


def composed_with(words: Sequence[str], name: str, text: str, *, known_as: str) -> DictConfig:
    """Return the config of a command line with a recipe of the given text instead of its own.

    Precedence is unchanged: typed values and `local` override the recipe.

    Args:
        words: the command line.
        name: name of the recipe.
        text: content of the recipe's file.
        known_as: the recipe's name in `choices`, under which its runs are listed.
    """
    overrides = OverridesParser.create().parse_overrides(list(words))
    remaining = [str(each.input_line) for each in overrides if each.key_or_group not in ("hparam", _SEARCHED)]
    folders = [folder for each in overrides if each.key_or_group == _SEARCHED for folder in each.value() or ()]  # type: ignore[union-attr]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "hparam" / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        searched = searching([*map(str, folders), f"file://{folder}"])
        composed = compose("main", [*remaining, searched, f"hparam={name}"], return_hydra_config=True)
        cfg = job_config(composed, composed.hydra.runtime.choices)
    return OmegaConf.merge(cfg, {"choices": {"hparam": known_as}})  # type: ignore[return-value]

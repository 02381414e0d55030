"""Names of the options of config groups: backbones, heads, adapters, recipes and datasets."""

from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

from dinoseg.config.options import options_in
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import check_annotations

CONFIGS = Path(__file__).parents[1] / "cfg"


def list_backbones(filter: str = "*", *, config_dir: str | PathLike[str] | None = None) -> list[str]:
    """Return the sorted names of backbones for `create_model`.

    Args:
        filter: pattern with `*`, `?` and `[...]`, such as `dinov3*`.
        config_dir: folder with config groups of your own, whose options are added.

    Raises:
        UserError: `config_dir` is no folder.

    Examples:
        >>> import dinoseg
        >>> dinoseg.list_backbones("dinov3_vits*")
        ['dinov3_vits16', 'dinov3_vits16plus']
    """
    return _options("backbone", filter, config_dir)


def list_heads(filter: str = "*", *, config_dir: str | PathLike[str] | None = None) -> list[str]:
    """Return the sorted names of heads for `create_model`; arguments and errors are those of `list_backbones`.

    Examples:
        >>> import dinoseg
        >>> dinoseg.list_heads("m*")
        ['mask2former', 'mask2former_meta', 'mlp', 'multiscale']
    """
    return _options("head", filter, config_dir)


def list_adapters(filter: str = "*", *, config_dir: str | PathLike[str] | None = None) -> list[str]:
    """Return the sorted names of adapters for `create_model`; arguments and errors are those of `list_backbones`.

    Examples:
        >>> import dinoseg
        >>> dinoseg.list_adapters("lora*")
        ['lora', 'lora_8bit', 'lora_all']
    """
    return _options("adapter", filter, config_dir)


def list_recipes(filter: str = "*", *, config_dir: str | PathLike[str] | None = None) -> list[str]:
    """Return the sorted names of recipes, options of `hparam`; arguments and errors are those of `list_backbones`.

    Examples:
        >>> import dinoseg
        >>> dinoseg.list_recipes("dpt_*")
        ['dpt_camvid', 'dpt_sarrarp']
    """
    return _options("hparam", filter, config_dir)


def list_datasets(filter: str = "*", *, config_dir: str | PathLike[str] | None = None) -> list[str]:
    """Return the sorted names of datasets for `open_dataset`; arguments and errors are those of `list_backbones`.

    Examples:
        >>> import dinoseg
        >>> dinoseg.list_datasets("*voc")
        ['pascal_voc']
    """
    return _options("data", filter, config_dir)


@check_annotations
def _options(group: str, filter: str, config_dir: str | PathLike[str] | None) -> list[str]:
    return [name for name in options_in(config_folders(config_dir), group) if fnmatchcase(name, filter)]


@check_annotations
def config_folders(config_dir: str | PathLike[str] | None) -> list[Path]:
    """Return the folders of config groups: the shipped one first, then the caller's.

    Raises:
        UserError: `config_dir` is not a folder.
    """
    if config_dir is None:
        return [CONFIGS]
    folder = Path(config_dir).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"config_dir={config_dir} is not a folder. Give the folder that holds your config groups.")
    return [CONFIGS, folder]

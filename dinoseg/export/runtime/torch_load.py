"""Loading of a file, a checkpoint or a run folder as a torch model, without a command line."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.resume import standalone_config
from dinoseg.experiment.trained import restore
from dinoseg.export.runtime.facts import ModelFacts
from dinoseg.export.runtime.runtime import Options
from dinoseg.export.runtime.segmenter import Segmenter
from dinoseg.export.runtime.torch_runtime import preserve_global_state
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.training import checkpoint
from dinoseg.training.engine import choose_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import stamp
from dinoseg.utils.precision import compute_dtype

_HELD = (None, "random")  # config values for weights that the checkpoint itself holds


def load_torch(path: Path, options: Options, *, key: str = "resume") -> Segmenter:
    """Load the model of an existing file, checkpoint or run folder, in eval mode.

    Raises:
        UserError: in the terms of a command line with the file as `key`.
    """
    device = choose_device(options.device)
    compute_dtype(options.precision, device)  # refuse a wrong precision before weights are read
    file = checkpoint.find(path, "best", key=key)
    origin = (file.absolute(), stamp(file))  # before it is read
    with preserve_global_state():
        info = checkpoint.describe(file, key=key)
        facts = ModelFacts.of(info, str(file))
        changes = {"engine.device": options.device, **_weights(file, info, options)}
        own = _config_folder(options)
        trust, use = options.trust, options.inference
        cfg = standalone_config(file, info, changes, inference=use, trust=trust, config_dir=own, key=key)
        strategy: InferenceStrategy = instantiate(cfg.inference)
        sizes = TrainedSizes.from_info(info)
        builder = ModelBuilder(cfg)
        model = restore(builder, file, key=key)[0].to(device)
        facts = replace(facts, pixels=builder.pixels.as_dict())
    if model.head.slots is not None:
        raise UserError(f"{file} is a slot model, which has no classes. mode=track tracks its segments.")
    limit_to_trained_size(model, sizes)
    is_whole = "facts" in info
    loaded = Segmenter(
        model,
        facts,
        to_container(cfg),
        info=info,
        strategy=strategy,
        precision=cfg.engine.precision if options.precision == "auto" else options.precision,
        file=file if is_whole else None,
        checkpoint=origin,
    )
    return loaded.eval()


def _config_folder(options: Options) -> Path | None:
    if options.config_dir is None:
        return None
    folder = Path(options.config_dir).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"config_dir={options.config_dir} is not a folder. Give the folder of your config groups.")
    return folder


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

"""Provenance of an evaluation: chosen options, config, model and data, as plain values for reports and records."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoseg.config.plain import to_container
from dinoseg.experiment.models import ModelBuilder


@dataclass(frozen=True)
class Provenance:
    """Origin of an evaluation.

    Args:
        choices: chosen option of each config group.
        config: the whole config as YAML.
        root: absolute path of the data set's folder; "" without one.
        group: regular expression of `data.group`; None without one.
        model: absolute path of the evaluated checkpoint, or the released weights; of an ensemble, those of all members.
        folder: run folder that stores the command line.
        training: run folder of the model's training; None if unknown, or of an ensemble.
        score: that selected the checkpoint (`trainer.score`); None if unknown.
        kind: of the evaluation, for headings: the options of the model, or that it is an ensemble.
    """

    choices: Mapping[str, str]
    config: str
    root: str
    group: str | None
    model: str
    folder: Path
    training: Path | None
    score: str | None
    kind: str


def provenance_of(builder: ModelBuilder, out_dir: Path, best: Path | None = None) -> Provenance:
    """Return the provenance of an evaluation into `out_dir`, or of the evaluation of `best` that ends a training."""
    folder, training = out_dir, None
    if best is not None:
        folder = training = best.parent.parent
    elif len(builder.checkpoints) == 1:
        training = Path(builder.checkpoints[0]).parent.parent
    root = builder.value("data").get("root")
    files = [best] if best else builder.checkpoints
    options = {str(group): str(option) for group, option in builder.options.items()}
    kind = " ".join(f"{group}={options[group]}" for group in ("backbone", "adapter", "head") if group in options)
    if len(files) > 1:
        kind = f"ensemble of {len(files)}"
    if builder.value("mode.ensemble.out_of_fold"):
        kind = f"{len(files)} models, each image by those of its fold"
    return Provenance(
        choices=options,
        config=builder.yaml,
        root="" if root is None else str(Path(str(root)).expanduser().resolve()),
        group=builder.value("data.group"),
        # absolute: mode=compare finds the training from any folder
        model=", ".join(str(Path(file).absolute()) for file in files)
        or str(to_container(builder.value("head")).get("weights")),
        folder=folder,
        training=training,
        score=builder.value("trainer.score"),
        kind=kind,
    )

"""mode=probe: closed-form linear probe (ridge regression) of each block of a backbone, in one pass."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tabulate import tabulate

from dinoseg.core.task import refuse_layers
from dinoseg.data.scan.scan import class_counts
from dinoseg.experiment.bare import build_bare_model
from dinoseg.experiment.builder import Builder
from dinoseg.extensions.probe.probe import Grid, Probe, Readings, Solution
from dinoseg.models.backbones.layers import resolve_layers
from dinoseg.models.model import SegmentationModel
from dinoseg.report.table import FEW, class_table
from dinoseg.utils.atomic import write_json
from dinoseg.utils.csv_text import write_csv_table
from dinoseg.utils.errors import name_parameters
from dinoseg.utils.ranges import NotNegative, OpenShare, Positive
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
COLUMNS = ("blocks", "val_miou", "held_out_miou", "val_accuracy", "strength", "balance")
_FLOOR = (
    "This is a baseline for a trained linear head, and the initialisation of head.init=probe. It does not rank "
    "backbones for fine-tuning."
)


def probe(
    cfg: DictConfig,
    *,
    out_dir: Path,
    layers: Sequence[int] | None = None,
    strengths: Sequence[Positive] = Grid.strengths,
    balances: Sequence[NotNegative] = Grid.balances,
    held_out: OpenShare = Grid.held_out,
) -> dict[str, Any]:
    """Solve a linear probe for each block alone and for the blocks that the head reads, and score them on val.

    Args:
        cfg: the whole config.
        out_dir: the run folder; probe.json and probe.csv go there.
        layers: blocks to probe, as in `head.layers`; None: all.
        strengths: see `Grid`.
        balances: see `Grid`.
        held_out: see `Grid`.
    """
    builder = Builder(cfg)
    refuse_layers(builder.task, "mode=probe", "Train head=linear instead.")
    engine = builder.engine()
    grid = Grid(tuple(strengths), tuple(balances), held_out, cfg.data.group, builder.seed)
    train = builder.dataset("train", reduced=True)
    val = builder.dataset("val")
    counts = class_counts(train, cfg.cache_dir)
    model, readings = _model(builder, layers)
    found = Probe(model.to(engine.device), train, counts.tolist(), engine, readings, grid)
    logger.info(
        "%d training images, %d of them held out for the choice; sums of %.2f GB",
        len(train),
        len(found.held_out),
        sum(part.numel() * part.element_size() for sums in found.sums.values() for part in sums.tensors().values())
        / 1e9,
    )
    if not found.rest:
        logger.warning("There is one training image: the choice uses the same image as the solution.")
    elif len(found.held_out) < FEW:
        logger.warning(
            "Strength, balance and best blocks are chosen on %s only, so the choice is noisy. Set mode.held_out above "
            "%g to hold out more.",
            count_of(found.held_out, "image"),
            held_out,
        )
    found.fit()
    solutions = found.choose()
    found.score(solutions, val)
    best = max(solutions, key=lambda solution: solution.choice.miou)
    if engine.is_main:
        _write(out_dir, solutions, best, val.classes)
    engine.close()
    return {"miou": best.scores["miou"], "best": best.name, "run": str(out_dir)}


def _model(builder: Builder, layers: Sequence[int] | None) -> tuple[SegmentationModel, Readings]:
    """Return a segmenter whose backbone returns all probed maps, and the sets of maps that are read together."""
    depth = builder.outline().backbone.depth
    with name_parameters({"layers": "mode.layers"}):
        alone = resolve_layers(list(range(depth)) if layers is None else list(layers), depth)
    together = resolve_layers(builder.settings("head")["layers"], depth)
    blocks = sorted({*alone, *together})
    sets = dict.fromkeys([*((block,) for block in sorted(alone)), tuple(together)])
    readings = {"+".join(map(str, each)): [blocks.index(block) for block in each] for each in sets}
    return build_bare_model(builder, blocks, builder.value("data.num_classes")), readings


def _write(out_dir: Path, solutions: Sequence[Solution], best: Solution, classes: Sequence[str]) -> None:
    rows = [
        {
            "blocks": each.name,
            "val_miou": each.scores["miou"],
            "held_out_miou": each.choice.miou,
            "val_accuracy": each.scores["accuracy"],
            "strength": each.strength,
            "balance": each.balance,
            "scores": each.scores,
        }
        for each in solutions
    ]
    write_json(out_dir / "probe.json", {"best": best.name, "classes": list(classes), "readings": rows})
    # scores in 0..1; an undefined score is an empty cell
    write_csv_table(out_dir / "probe.csv", COLUMNS, rows)
    print(f"classes of val, by the best blocks ({best.name}):\n\n{class_table(best.scores, classes)}\n")
    print(f"{probe_table(rows, best.name)}\n")
    blocks = best.name.replace("+", ",")
    print(f"best (*):     {best.name}, by the held-out images; head.layers=[{blocks}] reads {_them(best.name)}")
    print(f"written:      {out_dir}/probe.json, probe.csv, with {count_of(rows, 'result')}")
    print(_FLOOR)


def _them(name: str) -> str:
    return "them" if "+" in name else "it"


def probe_table(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    """Return rows with `COLUMNS` as text, with scores in percent and `best` marked."""
    shown = [
        (
            f"{row['blocks']}{' *' if row['blocks'] == best else ''}",
            *(_percent(row[key]) for key in COLUMNS[1:4]),
            f"{row['strength']:g}",
            f"{row['balance']:g}",
        )
        for row in rows
    ]
    headers = ["blocks", "val mIoU %", "held-out mIoU %", "val accuracy %", "ridge", "balance"]
    return tabulate(shown, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 5))


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"

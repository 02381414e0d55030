"""A trained model as one file: its weights and everything needed to use it, described like a checkpoint."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from dinoseg import __version__
from dinoseg.checkpoints.source import ModelSource
from dinoseg.checkpoints.trained import TrainedModel, find_trained_sizes
from dinoseg.checkpoints.unread import warn_unread
from dinoseg.core.contracts import require_classes
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.recipe import config_description
from dinoseg.inference.trained_sizes import KEY, TrainedSizes
from dinoseg.models.adapters import check_active
from dinoseg.models.model import SegmentationModel, non_persistent_buffers, stateless_modules, trained_names
from dinoseg.segmenter.facts import UNKNOWN, ModelFacts
from dinoseg.segmenter.runtime import MODEL_FILE
from dinoseg.training import checkpoint
from dinoseg.training.checkpoint import CHECKPOINT_FOLDER, Progress
from dinoseg.training.description import INITIAL, PRECISION, TEACHER, USE
from dinoseg.training.loading import CONSTANTS, frozen_fingerprint, misfits
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import PACKAGED
from dinoseg.utils.wording import count_of
from dinoseg.utils.yaml_text import read_yaml

logger = logging.getLogger(__name__)
_CHOICES = ("hparam", "data", "backbone", "adapter", "head")
_UNCHANGED = (  # keys whose names or regular expressions may look like paths, and one that is read but not stored
    *("classes", "group"),
    "config_dirs",
)
_LIBRARIES = ("torch", "transformers", "timm", "peft", "numpy", "pillow")
COUNTED = "every pixel of the split counted once, ignored pixels excluded"
_MEASURES = ("miou", "dice", "accuracy", "mean_accuracy")
_OFFICIAL = ("protocol", "scores", "ci95", "n", "unit", "rules", "interval")
_SCORES = "scores.json"  # in the folder of an evaluation
_NO_SOURCE = ("random", None)  # values for weights without a third-party source
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_LICENCES = (  # part of the name, licence of such weights, whether it restricts redistribution
    ("surgenet", "CC BY-NC-SA 4.0", True),
    ("dinov3", "DINOv3 License", True),
    ("facebook/dinov2-", "Apache-2.0", False),
    ("facebook/dino-vit", "Apache-2.0", False),
    (PACKAGED, "Apache-2.0", False),
)
TRAINER_LICENCE = "its trainer's own"


def export_model(
    source: ModelSource, *, out_dir: Path, delta: bool = False, gated: bool = False, scores: str | None = None
) -> dict[str, Any]:
    """Write a trained model to `out_dir`/model.safetensors; return its path.

    Args:
        source: the trained model.
        out_dir: the run folder.
        delta: write only trained weights; the file names the backbone's source, from where it is loaded again.
        gated: write weights whose licence restricts redistribution; do not share the file except on its terms.
        scores: folder of a mode=eval run of this checkpoint; None: the evaluation at the end of its training.

    Raises:
        UserError: if there is no checkpoint, the model has no classes, or the file would hold weights of restricted
            licence. Also if `delta` meets a backbone without a source, or `scores` is no evaluation of this checkpoint.
    """
    if source.resume is None:
        raise UserError("export=safetensors needs a trained model: give resume=<run folder or checkpoint>.")
    if delta and source.config["backbone"].get("weights") in (None, "random"):
        raise UserError(
            "export.delta=true: this backbone cannot be downloaded (backbone.weights=random), so a file without it "
            "would be useless. Leave export.delta out."
        )
    if scores is not None:
        scores_of(Path(source.resume), (), scores)  # report a wrong folder before the slow model build
    warn_unread(out_dir, ("cache_dir",), "This export uses no images.")
    trained = source.load()
    require_classes(trained.model.head, f"resume={source.resume}")
    sizes = find_trained_sizes(trained, out_dir)
    facts = facts_of(source, trained, sizes, delta=delta, scores=scores)
    path = out_dir / MODEL_FILE
    idle = {"format"} if sizes else {"format", KEY}
    info = {key: value for key, value in trained.info.items() if key not in idle}
    count, origin = write_model(path, source, trained.model, facts, info, delta=delta, gated=gated)
    size = f"{count_of(count, 'tensor')}, {path.stat().st_size / 1e6:.2f} MB"
    print(f"written to {path}: {size}; backbone {origin['name']}, licence {origin['licence']}")
    if delta:
        print(f"the backbone itself is not in it: {origin['weights']}, revision {origin['revision'] or 'unknown'}")
    if facts.scores is None:
        print("it holds no scores: add them with export.scores=<run folder of mode=eval>")
    weights_file = Path(str(source.settings("backbone").get("weights"))).expanduser()
    given = ', backbone="FILE"' if delta and weights_file.exists() else ""
    print(f'use: import dinoseg; model = dinoseg.load("{path}"{given}); out = model.predict("{facts.example}")')
    return {"path": str(path)}


def write_model(
    path: Path,
    source: ModelSource,
    model: SegmentationModel,
    facts: ModelFacts,
    info: Mapping[str, Any],
    *,
    delta: bool = False,
    gated: bool = False,
    where: str | None = None,
) -> tuple[int, Mapping[str, Any]]:
    """Write a model as one file; return the number of its tensors, and the facts of its backbone.

    Args:
        path: of the file.
        source: the model's config.
        model: the model to write; quantised weights are written in float32.
        facts: of the model.
        info: further entries of the file's description, such as the progress of its training.
        delta: see `export_model`.
        gated: see `export_model`.
        where: start of messages about the weights; None: the checkpoint.

    Raises:
        UserError: if the file cannot be written, the model is not that of its config, its LoRA layers are merged or
            off, or the file would hold weights that are not finite, or weights of restricted licence without `gated`.
    """
    check_active(model)
    stored = _stored_config(source.config, facts, path.parent)
    if model.task.thresholds is not None:  # numbers instead of `auto`
        stored["task"] = {**stored["task"], "threshold": model.task.thresholds}
    bits = None if delta else source.settings("adapter").get("bits")
    if bits is not None:
        # 4-bit layers multiply in bfloat16, 8-bit ones round their inputs to int8
        logger.warning(
            "adapter.bits=%s: %s holds the same weights in float32, and computes in float32. Its predictions differ in "
            "about 1 of 1,000 pixels from those of this model. For equal ones, write only the trained weights: "
            "delta=True, or export.delta=true.",
            bits,
            path.name,
        )
    tensors, frozen = _tensors(stored, model if bits is None else source.in_float32(model), delta)
    # loading checked the checkpoint, but not the backbone's weights
    checkpoint.check_finite(tensors, where or f"resume={source.resume}")
    updates = {name for name in tensors if name.startswith("model/backbone.") and ".lora_" in name}
    base = any(name.startswith("model/backbone.") for name in tensors.keys() - updates)
    facts = replace(facts, backbone={**facts.backbone, "in_file": base})
    if not gated:
        weights = [name for name in tensors if name.startswith("model/") and name not in updates]
        _check_licence(facts.backbone, source.config["head"].get("weights"), weights)
    description = {**config_description(ModelBuilder.of(stored), info), "folder": "."}
    made = {**description, **facts.description(), "frozen": frozen, "versions": dict(facts.versions)}
    remaining = {key: value for key, value in info.items() if key != PRECISION}  # which the config states
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(path, tensors, {"progress": asdict(Progress()), **remaining, **made})
    return len(tensors), facts.backbone


def facts_of(
    source: ModelSource,
    trained: TrainedModel,
    sizes: TrainedSizes | None,
    *,
    delta: bool = False,
    scores: str | None = None,
) -> ModelFacts:
    """Return the facts of a trained model, for an exported file of any kind.

    Args:
        source: the model's config.
        trained: the loaded model.
        sizes: training sizes to which images are reduced, as `find_trained_sizes` returns them.
        delta: whether the file holds only trained weights.
        scores: as of `export_model`.
    """
    # facts of a checkpoint that is itself an exported file
    before = with_evidence(ModelFacts.of(trained.info, f"resume={source.resume}"), source, scores)
    return complete_facts(before, source, trained.model, trained.info, sizes, delta=delta)


def with_evidence(facts: ModelFacts, source: ModelSource, scores: str | None = None) -> ModelFacts:
    """Return facts with the scores and data of the run whose checkpoint `source` names.

    Args:
        facts: of the model.
        source: the model's config.
        scores: as of `export_model`.
    """
    path = Path(str(source.resume))
    found = scores_of(path, facts.classes, scores) or facts.scores
    return replace(facts, scores=found, data=facts.data or data_of(path, str(source.config["choices"]["data"])))


def complete_facts(
    facts: ModelFacts,
    source: ModelSource,
    model: SegmentationModel,
    info: Mapping[str, Any],
    sizes: TrainedSizes | None,
    *,
    delta: bool,
) -> ModelFacts:
    """Return facts with all that follows from a model and its config.

    Args:
        facts: of the model; its backbone's source is used if it is known.
        source: the model's config.
        model: the model.
        info: description of its checkpoint; `frozen` is the hash of its frozen weights.
        sizes: as of `facts_of`.
        delta: as of `facts_of`.
    """
    return replace(
        facts,
        pixels=source.pixels.as_dict(),
        normalisation={name: getattr(model.backbone, name).flatten().tolist() for name in ("mean", "std")},
        sizes={
            **source.settings("resolution"),
            **(sizes.as_info()[KEY] if sizes else {}),
            USE: _inference_strategy(source),
        },
        backbone=facts.backbone or source_of(source.config, str(info["frozen"]["backbone"])),
        versions=_versions(),
        choices={
            group: str(option) for group in _CHOICES if (option := source.config["choices"].get(group)) is not None
        },
        delta=delta,
        dequantised=None if delta else source.settings("adapter").get("bits") or facts.dequantised,
    )


def _stored_config(config: Mapping[str, Any], facts: ModelFacts, folder: Path) -> dict[str, Any]:
    """Return the config that a file in a folder stores.

    It has no paths of this machine and no sources of weights that the file holds. Other sources are relative to it.
    """
    stored: dict[str, Any] = {**_strip_folders(config), TEACHER: None, INITIAL: None}
    if "root" in stored["data"]:
        stored["data"]["root"] = "???"
    backbone, head, adapter = stored["backbone"], stored["head"], stored["adapter"]
    if facts.delta and is_hub_id(backbone["weights"]) and facts.backbone["revision"]:
        backbone["weights"] = f"{facts.backbone['weights']}@{facts.backbone['revision']}"
    if facts.delta:
        for part, weights in ((part, config[part].get("weights")) for part in ("backbone", "head")):
            if isinstance(weights, str) and Path(weights).expanduser().exists():
                stored[part]["weights"] = _path_from(folder, Path(weights).expanduser())
    else:
        # a checkpoint with a random-weights backbone holds all of that backbone
        backbone |= {"weights": "random"} if "weights" in backbone else {}
        adapter |= {"bits": None} if "bits" in adapter else {}
        in_file = {"weights": None, "class_layer": "loaded", "trainable": "all"}
        head |= {key: value for key, value in in_file.items() if head.get("weights") is not None and key in head}
    return stored


def _path_from(folder: Path, path: Path) -> str:
    """Return the path from a folder to another place, or the name alone where they have no folder in common."""
    there, here = os.path.realpath(path), os.path.realpath(folder)
    try:
        common = Path(os.path.commonpath([there, here]))
    except ValueError:  # on other drives
        return path.name
    return path.name if common == common.parent else Path(os.path.relpath(there, here)).as_posix()


def _strip_folders(node: Any) -> Any:
    """Return a plain config in which each local path is reduced to its last part."""
    if isinstance(node, Mapping):
        return {key: value if key in _UNCHANGED else _strip_folders(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_strip_folders(value) for value in node]
    return Path(node).name if isinstance(node, str) and node.startswith(("/", "~", "./", "../")) else node


def _tensors(
    config: Mapping[str, Any], model: SegmentationModel, delta: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that a file of this config holds, and the hashes of those that it does not hold.

    Raises:
        UserError: they are not the tensors from which the config's model can be loaded.
    """
    builder = ModelBuilder.of(config)
    empty = builder.outline()
    builder.name_weights(empty)
    if not delta:
        empty.backbone.weights, empty.head.weights = "random", None
    state, wanted = model.state_dict(), empty.state_dict()
    held = {name: state[name] for name in (trained_names(model) if delta else state)}
    mistake = misfits({name: wanted[name] for name in trained_names(empty)}, held)
    changed = stateless_modules(model).items() ^ stateless_modules(empty).items()
    if changed and not mistake:
        first = min(place for place, _ in changed)
        kinds = sorted(kind for place, kind in changed if place == first)
        mistake = f"another module, {' or '.join(kinds)}, at {first}"
    if mistake:
        raise UserError(
            f"The model is not that of its config: {mistake}. A part was replaced, or with delta=True frozen or "
            "unfrozen, after the model was created. Choose parts by the arguments of create_model, write a whole file, "
            "or use torch.save(model.state_dict(), PATH)."
        )
    tensors = {f"{CONSTANTS}/{name}": value for name, value in non_persistent_buffers(model).items()}
    tensors |= {f"model/{name}": value for name, value in held.items()}
    return tensors, frozen_fingerprint(model if delta else empty)


def _check_licence(source: Mapping[str, Any], head: str | None, names: Sequence[str]) -> None:
    """Refuse to write third-party weights whose licence restricts redistribution.

    Args:
        source: of the backbone, see `source_of`.
        head: third-party source of the head's weights, such as a file of Meta's segmentors.
        names: of the tensors in the file.
    """
    foreign = {"backbone": source["gated"], "head": head is not None}
    held = {part: any(f"/{part}." in name for name in names) for part in foreign}
    part = next((part for part in foreign if foreign[part] and held[part]), None)
    if part is not None:
        what = f"{source['weights']} ({source['licence']})" if part == "backbone" else head
        raise UserError(
            f"The file would hold weights of the {part} {what}, whose licence restricts redistribution. Write only the "
            "trained weights (possible with LoRA and frozen backbones): delta=True, or export.delta=true. Or, if you "
            "do not share the file or comply with the licence: gated=True, or export.gated=true."
        )


def _inference_strategy(source: ModelSource) -> dict[str, Any]:
    """Return the inference strategy as plain values, for readers: loading uses the one in the config."""
    values = {key: value for key, value in source.settings(USE).items() if not key.startswith("_")}
    return {"option": str(source.config["choices"][USE]), **values}


def _versions() -> dict[str, str]:
    found = {"dinoseg": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_of(config: Mapping[str, Any], frozen: str) -> dict[str, Any]:
    """Return the name, source, revision, hash and licence of a backbone's weights.

    Args:
        config: as plain values: its `backbone` and `choices`.
        frozen: hash of the backbone's frozen weights.
    """
    backbone, choice = config["backbone"], config["choices"]["backbone"]
    weights = backbone.get("weights")
    name, revision = _last(weights), ""
    if is_hub_id(weights):
        name, _, revision = weights.partition("@")
        revision = _commit(name, revision or "main") or revision
    full_name = f"{choice} {backbone['name']}" if "name" in backbone else choice  # timm models
    licence, gated = _licence(full_name, weights)
    facts = {"name": full_name, "weights": name, "revision": revision or None, "hash": frozen}
    return {**facts, "licence": licence, "gated": gated}


def is_hub_id(weights: Any) -> TypeGuard[str]:
    """Return whether weights are named by a hub id, and no local file or folder has that name."""
    return isinstance(weights, str) and bool(_HUB_ID.fullmatch(weights)) and not Path(weights).expanduser().exists()


def _licence(names: str, weights: str | None) -> tuple[str, bool]:
    if weights in _NO_SOURCE:
        return TRAINER_LICENCE, False
    if str(weights).startswith(PACKAGED):
        names = ""
    known = f"{names} {weights}".lower()
    return next(((licence, gated) for part, licence, gated in _LICENCES if part in known), (UNKNOWN, False))


def _last(weights: str | None) -> str | None:
    """Return the name of weights without the local folders that contain them."""
    return weights if weights is None or weights.startswith(PACKAGED) else Path(weights).name


def _commit(name: str, revision: str) -> str | None:
    """Return the commit of a hub revision in the local hub cache; None where its weights were not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", "model.safetensors.index.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def scores_of(path: Path, classes: Sequence[str], evaluation: str | None) -> dict[str, Any] | None:
    """Return scores with their protocol, from an evaluation folder or the end of training; None where there are none.

    Args:
        path: the checkpoint.
        classes: a name for each id.
        evaluation: folder of a mode=eval run; None: the evaluation at the end of the training.

    Raises:
        UserError: if the folder holds no scores, those of another checkpoint, or of an earlier state of it.
    """
    if evaluation is None:
        folder = path.parent.parent / "evaluation"
        is_best = path.parent.name == CHECKPOINT_FOLDER and path.stem == "best" and (folder / _SCORES).is_file()
        if not is_best or _is_older(folder, path):
            return None
        try:
            return _read_scores(folder, classes, "val")
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder / _SCORES} is damaged ({error}). Remove it, or run mode=eval again.") from None
    folder = Path(evaluation).expanduser()
    try:
        config = read_yaml(folder / "config" / "config.yaml")
        resumed = Path(config["resume"])
        found = _read_scores(folder, classes, config["mode"]["split"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"export.scores={folder} is not a run folder of mode=eval with scores of images ({error}). Give one."
        ) from None
    if resumed.resolve() != path.resolve():
        raise UserError(
            f"export.scores={folder}: those scores belong to {resumed}, not to {path}. Evaluate this checkpoint."
        )
    if _is_older(folder, path):
        raise UserError(
            f"export.scores={folder}: those scores are older than {path}, which was saved again. Run mode=eval again."
        )
    return found


def _is_older(folder: Path, path: Path) -> bool:
    """Return whether the scores in a folder are older than a checkpoint, so that they belong to an earlier state."""
    return (folder / _SCORES).stat().st_mtime < path.stat().st_mtime


def _read_scores(folder: Path, classes: Sequence[str], split: str) -> dict[str, Any]:
    scores = json.loads((folder / _SCORES).read_text(encoding="utf-8"))
    found = {
        "split": split,
        "protocol": COUNTED,
        "pixels": scores["pixels"],
        "values": {key: scores.get(key) for key in _MEASURES},
        "ci95": scores.get("ci95"),
        "per_class": {name: row["iou"] for name, row in zip(classes, scores["classes"], strict=False)},
    }
    file = folder / "official_scores.json"
    if file.is_file():
        official = json.loads(file.read_text(encoding="utf-8"))
        found["official"] = {key: official.get(key) for key in _OFFICIAL}
    return found


def data_of(path: Path, name: str) -> dict[str, Any]:
    """Return a fingerprint of a run's training data: counts and hashes of the file names, without the names.

    Args:
        path: the checkpoint.
        name: of the data set's config.
    """
    found: dict[str, Any] = {"name": name}
    try:
        split = json.loads((path.parent.parent / "split.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found
    for side, names in split.items():
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        found[side] = {"count": len(names), "names_sha256": digest}
    return found

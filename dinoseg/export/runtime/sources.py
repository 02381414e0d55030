"""Where a backbone's weights come from, and what is known of their licence; no torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from dinoseg.export.runtime.facts import UNKNOWN

_PACKAGED = "dinoseg:"
_OWN = ("random", None)  # weights that nobody else has made
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_LICENCES = (  # what a name holds, the licence of such weights, whether they may not be passed on without its terms
    ("dinov3", "DINOv3 License", True),
    ("facebook/dinov2-", "Apache-2.0", False),
    ("facebook/dino-vit", "Apache-2.0", False),
    (_PACKAGED, "Apache-2.0", False),
)
OWN_LICENCE = "its trainer's own"


def source_of(cfg: Mapping[str, Any], frozen: str) -> dict[str, Any]:
    """Return what is known of a backbone's weights.

    Args:
        cfg: the plain config: its `backbone` and `choices`.
        frozen: hash of the backbone's frozen weights.
    """
    backbone, choice = cfg["backbone"], cfg["choices"]["backbone"]
    weights = backbone.get("weights")
    name, revision = _last(weights), ""
    if is_hub_id(weights):
        name, _, revision = weights.partition("@")
        revision = _commit(name, revision or "main") or revision
    full_name = f"{choice} {backbone['name']}" if "name" in backbone else choice  # of timm's models
    licence, gated = _licence(full_name, weights)
    facts = {"name": full_name, "weights": name, "revision": revision or None, "hash": frozen}
    return {**facts, "licence": licence, "gated": gated}


def is_hub_id(weights: Any) -> TypeGuard[str]:
    """Return whether weights are named by a hub id, and no file or folder here has that name."""
    return isinstance(weights, str) and bool(_HUB_ID.fullmatch(weights)) and not Path(weights).expanduser().exists()


def _licence(names: str, weights: str | None) -> tuple[str, bool]:
    if weights in _OWN:
        return OWN_LICENCE, False
    if str(weights).startswith(_PACKAGED):
        names = ""
    known = f"{names} {weights}".lower()
    return next(((licence, gated) for part, licence, gated in _LICENCES if part in known), (UNKNOWN, False))


def _last(weights: str | None) -> str | None:
    """Return weights without the folders of this machine that they lie in."""
    return weights if weights is None or weights.startswith(_PACKAGED) else Path(weights).name


def _commit(name: str, revision: str) -> str | None:
    """Return the commit that a hub's revision was when its weights were fetched here, None where they were not."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", "model.safetensors.index.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None

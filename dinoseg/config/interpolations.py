"""What interpolations of a checkpoint's config may stand for: plain values within it, as typed instead."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from dinoseg.config.limits import REMEDY, check_batch, check_value
from dinoseg.config.plain import Steps, at, below, dotted, nests, resolved, texts_of
from dinoseg.config.resolvers import RESOLVERS
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import shown

_MOST_POINTED = 10**6  # letters and values that all interpolations together stand for
_MOST_STEPS = 20  # from one interpolation to the next
_POINTER = re.compile(r"\$\{(\.*)([A-Za-z]\w*(?:\.[A-Za-z0-9]\w*)*)\}")
_COMPUTED = re.compile(rf"\$\{{(?:{'|'.join(RESOLVERS)}):[ ,]*\}}")  # once the pointers in it are taken out


def check_form(text: str, what: str) -> None:
    """Refuse a text with an interpolation that does more than point, or compute from what it points to."""
    rest = _COMPUTED.sub("", _POINTER.sub("", text))
    if "${" in text and ("$" in rest or "\\" in rest):
        raise UserError(f"{what}: this interpolation is refused. A config from a checkpoint may only point within it.")


def check_interpolations(config: Mapping[str, Any], composed: Mapping[str, Any], where: str) -> None:
    """Refuse interpolations of what is to be built, of so much that it would not end, and of what may not stand there.

    Args:
        config: from the file, plain; each text in it has passed `check_form`.
        composed: the config of the command line, plain: what the file lacks is looked up there.
        where: what an error calls the file.
    """
    _check_pointers(config, {**composed, **config}, where)
    whole = OmegaConf.create({**composed, **config})
    for steps, text in below(config, ()):
        if isinstance(text, str) and "${" in text:
            # what they stand for is held against the rules of the place where they stand: to point is no way round
            for deeper, value in below(resolved(whole, steps), steps):
                if value is not None:
                    check_value(value, deeper, f"{where}: {dotted(steps)}={text}, which stands for {shown(value)},")
    check_batch(whole, where)


def _check_pointers(config: Mapping[str, Any], whole: Mapping[str, Any], where: str) -> None:
    pointed = 0
    for steps, text in below(config, ()):
        for pointer in _POINTER.finditer(text) if isinstance(text, str) else ():
            what = f"{where}: {dotted(steps)}={shown(text)}"
            target = _followed(whole, steps, pointer, what)
            if nests(target):
                raise UserError(
                    f"{what} is refused: it points at something that is built, which may stand only where config files "
                    f"put it. {REMEDY}."
                )
            # counted before OmegaConf resolves any: thousands of pointers to one large table would take it hours
            pointed += sum(1 + len(node) if isinstance(node, str) else 1 for _, node in below(target, ()))
            if pointed > _MOST_POINTED:
                raise UserError(f"{where}: its interpolations stand for more than {_MOST_POINTED} values. {REMEDY}.")


def _followed(whole: Mapping[str, Any], steps: Steps, pointer: re.Match[str], what: str) -> Any:
    """Return what a pointer leads to, by way of others that stand alone; None where nothing stands.

    Args:
        whole: the config that it points within.
        steps: to the place of the pointer, from which leading dots count.
        pointer: a match of `_POINTER`.
        what: for the message: file, key and value.
    """
    for _ in range(_MOST_STEPS):
        dots, names = len(pointer[1]), pointer[2].split(".")
        steps = (*(steps[: max(0, len(steps) - dots)] if dots else ()), *names)
        target = at(whole, steps)
        following = _POINTER.fullmatch(target) if isinstance(target, str) else None
        if following is None:
            if nests(target) or all("${" not in text or _computes(text) for text in texts_of(target)):
                return target
            break
        pointer = following
    raise UserError(f"{what} is refused: it leads from one interpolation to the next. {REMEDY}.")


def _computes(text: str) -> bool:
    return bool(_COMPUTED.fullmatch(_POINTER.sub("", text)))

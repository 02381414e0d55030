"""Validation of config nodes against the signatures of their targets: known keys, types and ranges."""

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.ranges import check_value

TRUSTED = ("dinoseg.", "torch.nn.", "torch.optim.")  # packages whose targets are imported and inspected


def check_arguments(target: str, arguments: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Refuse keys that a target does not take, and values that its annotations do not allow.

    Args:
        target: a dotted path; targets outside the trusted packages are not checked.
        arguments: its keyword arguments.
        names: full config keys of these arguments, for messages; an argument without one appears by its own name.

    Raises:
        UserError: naming the key and what the target takes.
    """
    try:
        part = pkgutil.resolve_name(target) if target.startswith(TRUSTED) else None
    except (ImportError, AttributeError, ValueError):  # hydra's own error names the module that is missing
        part = None
    if part is None:
        return
    parameters = inspect.signature(part).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [str(key) for key in arguments if key not in parameters]
    if unknown and not takes_any:
        raise UserError(
            f"{target} does not take {', '.join(unknown)}. It takes: {', '.join(name for name in parameters)}. "
            f"Check the key's spelling."
        )
    with name_parameters(names or {}):
        for key, value in arguments.items():
            if key in parameters:
                check_value(key, value, parameters[key].annotation)

"""Classes of things, whose objects are separated; the others are stuff."""

from collections.abc import Collection, Sequence

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names


def find_things(
    classes: Sequence[str], things: Sequence[str] | None, background: int | None, stuff: Collection[int] = ()
) -> frozenset[int]:
    """Return the ids of the things.

    Args:
        classes: names in id order.
        things: names of the things; None: every class but the background and `stuff`.
        background: id of the class that is no object; None: there is none.
        stuff: ids of classes that an annotation file declares to be no things.

    Raises:
        UserError: a name is not a class or the background, or there are no things.
    """
    if unknown := [name for name in things or () if name not in classes]:
        raise UserError(f"data.things={unknown[0]} is not a class. Name some of {', '.join(classes)}.")
    if things is None:
        found = {*range(len(classes))} - {background, *stuff}
    else:
        found = {classes.index(name) for name in things}
    if background is not None and background in found:
        raise UserError(
            f"data.things names {classes[background]}, the background, which has no objects. Leave it out, or set "
            "data.background=null."
        )
    if not found:
        raise UserError(f"No class is a thing. Name those with objects: data.things=[NAME], of {join_names(classes)}.")
    return frozenset(found)


def advise_on_background(classes: Sequence[str]) -> str:
    """Return how to declare the class that is named background as no thing; "" if there is none."""
    return next((f"Set data.background={name}" for name in classes if name.lower() == "background"), "")

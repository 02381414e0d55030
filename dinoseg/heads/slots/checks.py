"""What the slot head's keys may be, and what does not fit."""

from collections.abc import Sequence

from dinoseg.errors import UserError
from dinoseg.geometry import widths


def map_width(in_dim: int | Sequence[int], num_layers: int) -> int:
    """Return the width of the one map; refuse several."""
    if num_layers != 1:
        raise UserError(
            f"head=slots gathers from one feature map, but backbone.layers gives {num_layers}. "
            f"Set backbone.layers=[-1]."
        )
    return widths(in_dim, num_layers)[0]


def check_positive(**values: int) -> None:
    """Refuse numbers below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"head.{name}={value}: give a whole number of at least 1.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        raise UserError(f"head.{name}={value} is unknown. Choose one of {', '.join(choices)}.")


def checked_grid(given: Sequence[int] | None, user: str) -> tuple[int, int]:
    """Return rows and columns; refuse what is no such pair, and None where `user`, a key and its value, needs them."""
    if given is None and not user:
        return 1, 1  # nobody asks
    if given is None:
        raise UserError(
            f"{user} is made for the cells of a training crop, and head.positions_grid=null. Give backbone.patch_size, "
            "from which they follow; or their rows and columns, such as head.positions_grid=[14,14]."
        )
    if len(given) != 2 or min(given) < 1:
        raise UserError(f"head.positions_grid={list(given)}: give rows and columns of cells, such as [28,28].")
    return given[0], given[1]


def slot_sizes(num_slots: int | Sequence[int], groups: str) -> list[int]:
    """Return the number of slots in each group, all in one without groups."""
    sizes = [num_slots] if isinstance(num_slots, int) else list(num_slots)
    shown = str(sizes).replace(" ", "") if not isinstance(num_slots, int) else num_slots
    if min(sizes, default=0) < 1:
        raise UserError(f"head.num_slots={shown}: give at least 1 slot, with head.groups two such numbers.")
    if groups == "off" and not isinstance(num_slots, int):
        raise UserError(
            f"head.num_slots={shown} with head.groups=off: without groups give one number, such as "
            f"head.num_slots={sum(sizes)}, or set head.groups=initial or always."
        )
    if groups != "off" and len(sizes) != 2:
        raise UserError(
            f"head.num_slots={shown} with head.groups={groups}: give the numbers of background and of foreground "
            f"slots, such as head.num_slots=[5,5]."
        )
    return sizes


def check_enough_cells(num_slots: int, grid: tuple[int, int]) -> None:
    """Refuse more slots than there are cells to share out."""
    cells = grid[0] * grid[1]
    if num_slots > cells:
        raise UserError(
            f"head.num_slots={num_slots} are more slots than the {grid[0]} x {grid[1]} = {cells} cells of a frame. Set "
            f"head.num_slots={cells} or fewer, or enlarge the frames (resolution.crop or resolution.scale)."
        )

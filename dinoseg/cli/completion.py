"""Tab completion: Hydra's own, without options that only other config files read."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO


@contextmanager
def hide_base_options(arguments: Sequence[str]) -> Iterator[None]:
    """Remove options such as `head=_object` from the suggestions that Hydra prints for a shell.

    Hydra knows no hidden options; a leading underscore marks them here.

    Args:
        arguments: the command line; nothing is changed unless it asks for suggestions.
    """
    if not any(word.startswith("query=") for word in arguments):
        yield
        return
    suggestions = StringIO()
    with redirect_stdout(suggestions):
        yield
    print(re.sub(r"\S+=_\S*\s?", "", suggestions.getvalue()), end="")

"""One-file models on a hub: download by name and revision, upload with a model card."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.runtime import file_in, names_of_files
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.wording import printable

_CARD = Path(__file__).with_name("model_card.md.jinja")
# characters that end a code span or a table cell, or begin HTML
_UNSAFE = {ord(letter): f"\\x{ord(letter):02x}" for letter in "`|<>"}


def fetch_model_file(
    source: str | PathLike[str], *, revision: str | None = None, token: str | None = None, runtime: str | None = None
) -> Path:
    """Return the model file in a local folder or a hub repository; only that file and its weights are downloaded.

    Where the hub does not answer, an earlier download is used.

    Raises:
        UserError: if the source holds no model, or the hub does not answer and nothing is cached.
    """
    names = names_of_files(runtime)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        with _client_errors_as_user_errors(str(source), token):
            from huggingface_hub import snapshot_download

            # an ONNX file may have its weights in a second file
            patterns = [f"{name}*" for name in names]
            folder = Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
    found = file_in(folder, runtime)
    if found is None:
        raise UserError(
            f"{source} holds no {' and no '.join(names)}. Give a folder or repository that push_to_hub made."
        )
    return found


def push(
    folder: Path,
    facts: ModelFacts,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | None,
    gated: bool,
) -> str:
    """Upload a folder with a model's file, and a model card, to a repository; return the commit's address.

    Args:
        folder: receives the card, too.
        facts: of the model.
        repo_id: created if missing.
        private: as of `Model.push_to_hub`, like the other arguments.
        revision: see there.
        token: see there.
        gated: see there.

    Raises:
        UserError: if the file holds weights of restricted licence without `gated`, or the hub refuses the upload.
    """
    source = facts.backbone
    if source.get("gated") and source.get("in_file", True) and not gated:
        raise UserError(
            f"{repo_id}: the model holds weights of {source.get('weights')} ({source.get('licence')}), whose licence "
            "restricts redistribution. Export with export=safetensors export.delta=true, or comply with the licence "
            "and pass gated=True."
        )
    write_card(facts, repo_id, folder)
    with _client_errors_as_user_errors(repo_id, token):
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="A segmentation model of dinoseg"
        )
    return str(done.commit_url)


@contextmanager
def _client_errors_as_user_errors(repo: str, token: str | None) -> Iterator[None]:
    """Turn every exception of a hub's client into one message that does not contain the token."""
    try:
        yield
    except Exception as error:  # the client's libraries raise their own types
        reason = str(error).replace(token, "...") if token else str(error)
        first_line = reason.strip().partition("\n")[0][:300]
        raise UserError(
            f"{repo}: the hub request failed ({type(error).__name__}: {first_line}). Check the name and the network, "
            "and log in with `hf auth login`; read a local file with dinoseg.load."
        ) from None


def write_card(facts: ModelFacts, name: str, folder: Path) -> None:
    """Write the model card of a model called `name` to a folder, as README.md.

    Raises:
        UserError: if it cannot be written.
    """
    with file_errors_as_user_errors(folder):
        write_text(folder / "README.md", model_card(facts, name))


def model_card(facts: ModelFacts, name: str) -> str:
    """Return the text of a model card; text from the file is escaped, so that it renders as text alone."""
    from jinja2 import Environment  # which predictions do not need

    templates = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    templates.filters |= {"code": _code, "percent": _percent}
    return templates.from_string(_CARD.read_text(encoding="utf-8")).render(facts=facts, name=name)


def _code(value: Any) -> str:
    """Return a value as one code span, in which no link, emphasis or HTML is rendered."""
    text = printable(" ".join(str(value).split()))
    return f"`{text.translate(_UNSAFE) or ' '}`"


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}" if type(value) in (int, float) and 0 <= value <= 1 else "-"

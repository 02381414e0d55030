"""One-file models on a hub: fetched by name and revision, and uploaded with a model card."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from dinoseg.export.runtime.card import model_card
from dinoseg.export.runtime.facts import Facts
from dinoseg.export.runtime.onnx_model import parts_of
from dinoseg.export.runtime.runtime import FILES, file_in
from dinoseg.utils.errors import UserError


def fetched(
    source: str | PathLike[str], *, revision: str | None = None, token: str | None = None, runtime: str | None = None
) -> Path:
    """Return the file of a model in a folder here or in a hub's repository, of which nothing else is fetched.

    Where the hub does not answer, what was fetched before is taken.

    Raises:
        UserError: neither holds one, or the hub does not answer.
    """
    folder = Path(source).expanduser()
    names = [FILES[runtime]] if runtime in FILES else list(FILES.values())
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{source} is a file: dinoseg.load reads it. Here, give a folder, or ORG/NAME of a hub.")
        with _telling(str(source), token):
            from huggingface_hub import snapshot_download

            # an ONNX file may keep its weights beside it
            patterns = [f"{name}*" for name in names]
            folder = Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
    found = file_in(folder, runtime)
    if found is None:
        raise UserError(
            f"{source} holds no {' and no '.join(names)}. Give a folder or repository that push_to_hub made."
        )
    return found


def push(
    file: Path,
    facts: Facts,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | None,
    gated: bool,
) -> str:
    """Upload a model's file and a card of its facts to a repository, made if need be; return the commit's address.

    Raises:
        UserError: it holds weights that are not to be passed on freely, it knows its weights by another name, or
            the hub does not take it.
    """
    source = facts.backbone
    if source.get("gated") and source.get("in_file", True) and not gated:
        raise UserError(
            f"{file.name} holds weights of {source.get('weights')} ({source.get('licence')}), whose licence says on "
            "which terms they may be passed on. Export with export.delta=true, or keep to them and say gated=True."
        )
    runtime = next((key for key, name in FILES.items() if Path(name).suffix == file.suffix), "torch")
    parts = parts_of(file, FILES[runtime])  # of a large ONNX file, with its weights, which it knows by name
    with TemporaryDirectory() as folder, _telling(repo_id, token):
        from huggingface_hub import HfApi

        for part in parts:
            target = Path(folder) / (FILES[runtime] if part == file else part.name)
            try:
                target.symlink_to(part)  # which may be larger than the disk of temporary files
            except OSError:
                shutil.copyfile(part, target)
        (Path(folder) / "README.md").write_text(model_card(facts, repo_id), encoding="utf-8")
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="A segmentation model of dinoseg"
        )
    return str(done.commit_url)


@contextmanager
def _telling(repo: str, token: str | None) -> Iterator[None]:
    """Turn whatever a hub's client raises into one message, in which no token stands."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"{repo}: a hub needs {error.name}, which is not installed: pip install {error.name}"
        ) from error
    except Exception as error:  # of whatever library the hub's client speaks through
        kind = type(error).__name__
        reason = (str(error).strip().splitlines() or [kind])[0][:300]
        hidden = reason.replace(token, "...") if token else reason
        raise UserError(
            f"{repo}: the hub does not answer, or not with what was asked for ({kind}: {hidden}). Check the name and "
            "the network, and log in with `hf auth login`; a file that you have is read by dinoseg.load."
        ) from None

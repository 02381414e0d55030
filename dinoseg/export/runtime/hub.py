"""One-file models on a hub: download by name and revision, upload with a model card."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dinoseg.export.runtime.facts import UNKNOWN, ModelFacts
from dinoseg.export.runtime.onnx_model import parts_of
from dinoseg.export.runtime.runtime import FILES, file_in
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.wording import printable


def fetch_model_file(
    source: str | PathLike[str], *, revision: str | None = None, token: str | None = None, runtime: str | None = None
) -> Path:
    """Return the model file in a local folder or a hub repository; only that file and its weights are downloaded.

    Where the hub does not answer, an earlier download is used.

    Raises:
        UserError: if the source is a file or holds no model, or the hub does not answer and nothing is cached.
    """
    folder = Path(source).expanduser()
    names = [FILES[runtime]] if runtime in FILES else list(FILES.values())
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{source} is a file: dinoseg.load reads it. Here, give a folder, or ORG/NAME of a hub.")
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
    file: Path,
    facts: ModelFacts,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | None,
    gated: bool,
) -> str:
    """Upload a model's file and its model card to a repository, created if missing; return the commit's address.

    Raises:
        UserError: if the file holds weights of restricted licence without `gated`, or the hub refuses the upload. Also
            if the name of its weight file does not match the model's name on the hub.
    """
    source = facts.backbone
    if source.get("gated") and source.get("in_file", True) and not gated:
        raise UserError(
            f"{file.name} holds weights of {source.get('weights')} ({source.get('licence')}), whose licence restricts "
            "redistribution. Export with export.delta=true, or comply with the licence and pass gated=True."
        )
    runtime = next((key for key, name in FILES.items() if Path(name).suffix == file.suffix), "torch")
    parts = parts_of(file, FILES[runtime])  # a large ONNX file refers to its weight file by name
    with TemporaryDirectory() as folder, _client_errors_as_user_errors(repo_id, token):
        from huggingface_hub import HfApi

        for part in parts:
            target = Path(folder) / (FILES[runtime] if part == file else part.name)
            try:
                target.symlink_to(part)  # a link: the file may be larger than the temporary disk
            except OSError:
                shutil.copyfile(part, target)
        write_card(facts, repo_id, Path(folder))
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
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"{repo}: a hub needs {error.name}, which is not installed: pip install {error.name}"
        ) from error
    except Exception as error:  # the client's libraries raise their own types
        kind = type(error).__name__
        reason = (str(error).strip().splitlines() or [kind])[0][:300]
        hidden = reason.replace(token, "...") if token else reason
        raise UserError(
            f"{repo}: the hub request failed ({kind}: {hidden}). Check the name and the network, and log in with `hf "
            "auth login`; read a local file with dinoseg.load."
        ) from None


def write_card(facts: ModelFacts, name: str, folder: Path) -> None:
    """Write the model card of a model called `name` to a folder, as README.md.

    Raises:
        UserError: if it cannot be written.
    """
    with file_errors_as_user_errors(folder):
        write_text(folder / "README.md", model_card(facts, name))


_HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # SPDX names to the hub's; all others are "other"
_UNSAFE = re.compile("[`|<>]")  # end a code span or a table cell, or begin HTML


def model_card(facts: ModelFacts, repo_id: str) -> str:
    """Return the text of a model card; text from the file is escaped, so that it renders as text alone."""
    return (
        "\n".join([*_header(facts), *_use(facts, repo_id), *_classes(facts), *_scores(facts), *_origin(facts)]) + "\n"
    )


def _header(facts: ModelFacts) -> Iterator[str]:
    licence = str(facts.backbone.get("licence", UNKNOWN))
    yield "---"
    yield f"license: {_HUB_LICENCES.get(licence, 'other')}"
    if licence not in _HUB_LICENCES:
        yield f"license_name: {json.dumps(licence)}"  # a JSON string is valid YAML
    yield "library_name: dinoseg"
    yield "pipeline_tag: image-segmentation"
    yield "---"
    yield ""


def _use(facts: ModelFacts, repo_id: str) -> Iterator[str]:
    backbone = _text(facts.backbone.get("name", UNKNOWN))
    yield f"# {repo_id}"
    yield ""
    yield f"Semantic segmentation, {len(facts.classes)} classes, on the backbone {backbone}; made with dinoseg."
    yield ""
    yield "```python"
    yield "from dinoseg import Model"
    yield ""
    yield f"model = Model.from_pretrained({repo_id!r})"
    yield f"out = model.predict({_escape(json.dumps(facts.example))})"
    yield "out.mask, out.areas, out.overlay()"
    yield "```"
    yield ""
    if facts.delta:
        yield (
            "The file holds only the trained weights. The backbone is loaded from "
            f"{_text(facts.backbone.get('weights'))}, revision {_text(facts.backbone.get('revision') or UNKNOWN)}, "
            "when the file is opened."
        )
        yield ""


def _classes(facts: ModelFacts) -> Iterator[str]:
    yield "## Classes"
    yield ""
    yield "| id | name | colour | IoU |"
    yield "|---|---|---|---|"
    per_class = (facts.scores or {}).get("per_class")
    for number, (name, colour) in enumerate(zip(facts.classes, facts.palette, strict=True)):
        yield f"| {number} | {_text(name)} | {tuple(colour)} | {_percent(_at(per_class, name))} |"
    yield ""


def _scores(facts: ModelFacts) -> Iterator[str]:
    yield "## Scores"
    yield ""
    if facts.scores is None:
        yield "The file holds no scores."
        yield ""
        return
    data, split = facts.data.get("name", UNKNOWN), facts.scores.get("split")
    yield f"On the split {_text(split)} of {_text(data)}: {_text(facts.scores.get('protocol'))}."
    yield ""
    yield from _table(facts.scores.get("values"), facts.scores.get("ci95"))
    official = facts.scores.get("official")
    if isinstance(official, Mapping):
        count, unit = _text(official.get("n")), _text(official.get("unit"))
        yield f"By the protocol {_text(official.get('protocol'))}, 95 % intervals over {count} units ({unit}):"
        yield ""
        yield from _table(official.get("scores"), official.get("ci95"))


def _origin(facts: ModelFacts) -> Iterator[str]:
    yield "## Where it comes from"
    yield ""
    for key in ("name", "weights", "revision", "hash", "licence"):
        yield f"- backbone {key}: {_text(facts.backbone.get(key) or UNKNOWN)}"
    for side, what in facts.data.items():
        if isinstance(what, Mapping):
            count, digest = _text(what.get("count")), _text(what.get("names_sha256"))
            yield f"- data {_text(side)}: {count} images, SHA-256 of their names {digest}"
    yield f"- made with: {', '.join(f'{_text(name)} {_text(number)}' for name, number in facts.versions.items())}"
    yield ""
    yield "## Limits"
    yield ""
    largest = facts.sizes.get("largest")
    if largest:
        yield (
            f"Its training images had about {_text(facts.sizes.get('typical'))} pixels on the longer side, enlarged at "
            f"most to {_text(largest)}. Larger images are reduced to that scale first."
        )
    yield (
        "Scores are for one dataset: on other cameras, places or tissues the model may perform worse, without warning."
    )


def _table(values: Any, intervals: Any) -> Iterator[str]:
    if not isinstance(values, Mapping):
        return
    yield "| score | % | 95 % interval |"
    yield "|---|---|---|"
    for key, value in values.items():
        limits = _at(intervals, key)
        interval = " .. ".join(map(_percent, limits)) if isinstance(limits, list) else "-"
        yield f"| {_text(key)} | {_percent(value)} | {interval} |"
    yield ""


def _at(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}" if type(value) in (int, float) and 0 <= value <= 1 else "-"


def _text(value: Any) -> str:
    """Return a value as a number or one code span, in which no link, emphasis or HTML is rendered."""
    if type(value) in (int, float):
        return str(value)
    text = _escape(printable(" ".join(str(value).split())))
    return f"`{text or ' '}`"


def _escape(text: str) -> str:
    return _UNSAFE.sub(lambda letter: f"\\x{ord(letter[0]):02x}", text)

"""Entry point of `python -m dinoseg`: composes the config and launches the job."""

import os
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path

import dinoseg

CONFIGS = str(Path(__file__).parent / "cfg")
failures: list[str] = []  # error messages of failed jobs


def main() -> None:
    """Run the command line; exit with 1 if a job failed, 130 on Ctrl-C, 141 if the reader of stdout is gone."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: pipes on Windows encode few characters
    try:
        _command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_if_unread()
        raise
    except KeyboardInterrupt:  # before a job begins; a running job reports an interrupt itself
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    if failures:
        sys.exit(1)


def _leave_if_unread() -> None:
    """Exit with 141 if the reader of standard output has gone."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it again at exit
        sys.exit(141)


def _command(arguments: list[str]) -> None:
    if not arguments or arguments == ["mode=help"] or {"-h", "--help"} & set(arguments):
        from dinoseg.modes.help import help_for

        print(help_for(arguments))
        return
    if "--version" in arguments:
        print(versions())
        return
    import hydra

    from dinoseg.cli.checkpoint_keys import root_config
    from dinoseg.cli.hydra_setup import hide_base_options, set_up_hydra
    from dinoseg.cli.typos import check_words, explain_errors
    from dinoseg.cli.words import as_text, flags_last
    from dinoseg.config.options import config_folders
    from dinoseg.utils.errors import UserError, file_errors_as_user_errors

    set_up_hydra()
    folders = config_folders(arguments, Path(CONFIGS))
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise errors unchanged
    try:
        typed = as_text(flags_last(arguments))
        # file errors: of the run folder, which Hydra creates, too
        with file_errors_as_user_errors(Path.cwd()), explain_errors(typed, folders), hide_base_options(typed):
            check_words(typed, folders)
            config_name = root_config(typed, folders)
            sys.argv[1:] = typed
            hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(run)()
    except UserError as error:
        _print_error(str(error))
        sys.exit(1)


def _print_error(message: str) -> None:
    from dinoseg.utils.wording import printable

    print(f"error: {printable(message)}", file=sys.stderr)  # it may quote an override with unprintable characters


def run(cfg):  # noqa: ANN001, ANN201 - hydra.main wants the bare signature
    """Run one job; print a user error as one message, and continue a sweep after any failure."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from dinoseg.cli.launch import Job, launch
    from dinoseg.cli.typos import explain_errors
    from dinoseg.config.job import job_config
    from dinoseg.config.plain import to_container
    from dinoseg.runs.location import locate_runs
    from dinoseg.utils.errors import UserError
    from dinoseg.utils.interrupt import Interrupted, raise_on_signal

    hydra_cfg = HydraConfig.get()
    composed = job_config(cfg, hydra_cfg)
    words = to_container(hydra_cfg.overrides)["task"]  # as typed: single access would resolve each `${...}`
    try:
        # once more, since the words of a job of a sweep are not those that were typed
        with raise_on_signal(), explain_errors(words, [Path(CONFIGS), *map(Path, composed.config_dirs)]):
            location = locate_runs(hydra_cfg, Path(hydra_cfg.runtime.output_dir))
            return launch(Job(composed, location, words))
    except UserError as error:
        message = str(error)
        _print_error(message)
    except BrokenPipeError:
        _leave_if_unread()
        raise
    except Interrupted as stop:
        print(f"\ninterrupted{stop.note and ': '}{stop.note}", file=sys.stderr)
        sys.exit(stop.status)
    except Exception as error:
        if hydra_cfg.mode != RunMode.MULTIRUN:
            raise
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()  # raising would lose the sweep's table
    failures.append(message)
    return {"error": message}


def versions() -> str:
    """Return the versions of dinoseg, torch with its CUDA, and Python, one per line."""
    import platform

    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    seen = f", {torch.cuda.device_count()} GPUs found" if torch.version.cuda else ""
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return f"dinoseg {dinoseg.__version__}\ntorch {torch.__version__} ({cuda}{seen})\n{python}"


if __name__ == "__main__":
    main()

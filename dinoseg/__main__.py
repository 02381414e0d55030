"""`python -m dinoseg`: compose the config, and hand it to launch."""

import argparse
import os
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path

CONFIGS = str(Path(__file__).parent / "cfg")
failures: list[str] = []  # messages of the jobs that did not end well


def main() -> None:
    """Run the command line; exit status 1 where any job failed, 141 where nobody reads on, as of `| head`."""
    if sys.platform == "darwin":  # torch reads it once, when it is imported: what MPS lacks, the CPU computes
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a pipe on Windows knows few letters
    try:
        _command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_if_unread()
        raise
    except KeyboardInterrupt:  # before a job begins, which says itself what is left of it
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    if failures:
        sys.exit(1)


def _leave_if_unread() -> None:
    """End the process where the reader of standard output has gone: there is nobody to tell."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        sys.exit(141)


def _command(arguments: list[str]) -> None:
    if not arguments or arguments == ["mode=help"] or {"-h", "--help"} & set(arguments):
        from dinoseg.modes.help import help_for

        print(help_for(arguments))
        return
    if "--version" in arguments:
        from dinoseg.cli.version import versions

        print(versions())
        return
    import hydra
    from hydra.errors import HydraException
    from yaml import YAMLError

    from dinoseg.cli.extras import check_intervals, hush_schemas, missing_extra
    from dinoseg.cli.own_keys import with_own_keys
    from dinoseg.cli.recipes import with_recipe_files
    from dinoseg.cli.typos import check_patterns, explain, explain_value
    from dinoseg.cli.words import as_text, flags_last
    from dinoseg.config.options import config_folders
    from dinoseg.config.resolvers import register_resolvers
    from dinoseg.utils.errors import UserError, telling_file_errors

    register_resolvers()
    hush_schemas()
    folders = config_folders(arguments, Path(CONFIGS))
    # Python 3.14 looks into each help text as it is given; one of Hydra 1.3 is an object, on which it would end
    argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that an error comes back as it was raised
    try:
        words = with_recipe_files(as_text(flags_last(arguments), Path(CONFIGS)), folders)
        check_patterns(words, folders)
        check_intervals(words)
        sys.argv[1:] = with_own_keys(words)
        with telling_file_errors(Path.cwd()):  # of the run folder itself, which Hydra makes
            hydra.main(version_base="1.3", config_path=CONFIGS, config_name="main")(run)()
    except UserError as error:
        _fail(str(error))
    except HydraException as error:
        _fail(explain(sys.argv[1:], folders, error))
    except YAMLError as error:  # of a config file of the user's
        _fail(f"A config file is no YAML: {' '.join(str(error).split())}. Correct it there.")
    except (ImportError, RuntimeError) as error:
        message = missing_extra(sys.argv[1:], error)
        if not message:
            raise
        _fail(message)
    except ValueError as error:  # Hydra's and OmegaConf's, of what a word may not stand for; or a job's
        message = explain_value(sys.argv[1:], folders, error)
        if not message:
            raise
        _fail(message)


def _fail(message: str) -> None:
    _tell(message)
    sys.exit(1)


def _tell(message: str) -> None:
    from dinoseg.utils.wording import printable

    print(f"error: {printable(message)}", file=sys.stderr)  # a word of the command line may stand in it


def run(cfg):  # noqa: ANN001, ANN201 - hydra.main wants the bare signature
    """Run one job; a mistake that the user can mend is one message, and a sweep goes on after any failure."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from dinoseg.cli.launch import launch
    from dinoseg.config.job import job_config
    from dinoseg.config.plain import plain
    from dinoseg.utils.errors import UserError
    from dinoseg.utils.interrupt import Interrupted, raised

    hydra_cfg = HydraConfig.get()
    composed = job_config(cfg, hydra_cfg.runtime.choices)
    words = plain(hydra_cfg.overrides)["task"]  # as typed: asked for one by one, each `${...}` in them is resolved
    try:
        with raised():
            return launch(composed, Path(hydra_cfg.runtime.output_dir), words)
    except UserError as error:
        message = str(error)
        _tell(message)
    except BrokenPipeError:
        _leave_if_unread()
        raise
    except Interrupted as stop:
        print(f"\ninterrupted{stop.note and ': '}{stop.note}", file=sys.stderr)
        sys.exit(stop.status)
    except Exception as error:
        from dinoseg.cli.typos import misplaced
        from dinoseg.config.options import config_folders

        if message := misplaced(words, config_folders(sys.argv[1:], Path(CONFIGS)), error):
            _tell(message)
        elif hydra_cfg.mode != RunMode.MULTIRUN:
            raise
        else:
            message = f"{type(error).__name__}: {error}"
            traceback.print_exc()  # raised, it would cost the sweep its table
    failures.append(message)
    return {"error": message}


if __name__ == "__main__":
    main()

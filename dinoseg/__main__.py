"""`python -m dinoseg`: compose the config, and hand it to launch."""

import os
import sys
import traceback
from pathlib import Path

CONFIGS = str(Path(__file__).parent / "cfg")
failures: list[str] = []  # messages of the jobs that did not end well


def main() -> None:
    """Run the command line; exit status 1 where any job failed."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["mode=help"] or {"-h", "--help"} & set(arguments):
        from dinoseg.modes.help import overview

        print(overview())
        return
    import hydra
    from hydra.errors import HydraException

    from dinoseg.config import register_resolvers

    register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that an error comes back as it was raised
    try:
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name="main")(run)()
    except HydraException as error:
        from dinoseg.typos import explain

        print(f"error: {explain(arguments, CONFIGS, error)}", file=sys.stderr)
        sys.exit(1)
    if failures:
        sys.exit(1)


def run(cfg):  # noqa: ANN001, ANN201 - hydra.main wants the bare signature
    """Run one job; a mistake that the user can mend is one message, and a sweep goes on after any failure."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from dinoseg.config import plain
    from dinoseg.errors import UserError
    from dinoseg.launch import launch

    hydra_cfg = HydraConfig.get()
    groups = {key: value for key, value in plain(hydra_cfg.runtime.choices).items() if "/" not in key}
    composed = OmegaConf.create({**plain(cfg), "choices": groups})
    try:
        return launch(composed, Path(hydra_cfg.runtime.output_dir), list(hydra_cfg.overrides.task))
    except UserError as error:
        message = str(error)
        print(f"error: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        on = "; the run goes on from its last save with resume=auto" if groups["mode"] == "train" else ""
        print(f"\ninterrupted{on}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hydra_cfg.mode != RunMode.MULTIRUN:
            raise
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()  # raised, it would cost the sweep its table
    failures.append(message)
    return {"error": message}


if __name__ == "__main__":
    main()

"""Check that a config, which run folders store, holds no credentials."""

from omegaconf import DictConfig

from dinoseg.config.plain import dotted_name, to_container, walk
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import has_credentials


def check_credentials(node: DictConfig | None) -> None:
    """Refuse URLs with a user or a password in the config of loggers.

    Interpolations pass: run folders store them unresolved.

    Args:
        node: the config group `logger`, if there is one.

    Raises:
        UserError: naming the key of the URL, without its value.
    """
    for key_path, value in walk(to_container(node)) if node else ():
        if isinstance(value, str) and has_credentials(value):
            name = dotted_name(("logger", *key_path))
            raise UserError(
                f"{name} is a URL with a user or a password, which the run folder would "
                "store. Leave them out of it, and set them in the environment: MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or WANDB_API_KEY."
            )

"""Builder of the loggers of a config, from the config group `logger`."""

from functools import partial
from inspect import isclass, signature
from pathlib import Path

from dinoseg.config.credentials import check_credentials
from dinoseg.config.nodes import expect_type, type_errors_as_user_errors
from dinoseg.experiment.models import ModelBuilder
from dinoseg.report.log import LoggerFactory
from dinoseg.report.loggers.logger import Logger

_REMEDY = (
    "Let its `_target_` name a class that inherits dinoseg.report.loggers.logger.Logger, and set `_partial_: true`."
)


def logger_factories(builder: ModelBuilder) -> dict[str, LoggerFactory]:
    """Return a function for each logger of a config, by name, that opens it for a run.

    Raises:
        UserError: a config node makes no logger, holds credentials, or needs a package that is not installed. The class
            is only known when the function is called.
    """
    check_credentials(builder.value("logger"))
    return {str(name): _factory(builder, f"logger.{name}") for name in builder.value("logger") or ()}


def _factory(builder: ModelBuilder, key: str) -> LoggerFactory:
    with type_errors_as_user_errors(key, _REMEDY):
        factory = builder.part(key)
        # here, since a TypeError inside the constructor drops the logger, but one of its arguments ends the run
        signature(factory).bind(Path(), start_step=0)
    target = factory.func if isinstance(factory, partial) else factory
    if isclass(target) and issubclass(target, Logger):
        target.check_installed()

    def open_logger(out_dir: Path, *, start_step: int) -> Logger:
        return expect_type(Logger, factory(out_dir, start_step=start_step), key)

    return open_logger

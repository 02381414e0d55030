"""A sweep that searches: optuna chooses the values of each job by what earlier ones have scored."""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dinoseg.errors import UserError
from dinoseg.storage import locks

SAMPLERS = ("tpe", "random")
DIRECTIONS = ("maximize", "minimize")
_WORDS, _ERROR = "words", "error"  # what a study is told of itself, and a trial that its job has failed
_HOPELESS = 3  # jobs that have failed, and none that has not: the next would, too


class Search(Sweeper):
    """Searches the values of a sweep; the same command goes on with a search that was ended in whatever way.

    Args:
        storage: file that remembers all jobs.
        trials: how many there shall be.
        at_once: how many are chosen before the first of them has a score.
        score: key of what a job returns.
        direction: maximize or minimize.
        sampler: tpe or random.
        seed: with the number of a job it says what is drawn for it.

    Raises:
        UserError: a value is none of these.
    """

    hydra_context: HydraContext
    launcher: Launcher

    def __init__(
        self, storage: str, trials: int, at_once: int, score: str, direction: str, sampler: str, seed: int
    ) -> None:
        for name, number in (("trials", trials), ("at_once", at_once)):
            if not isinstance(number, int) or number < 1:
                raise UserError(f"hydra.sweeper.{name}={number}: give a whole number of at least 1.")
        for name, value, allowed in (("direction", direction, DIRECTIONS), ("sampler", sampler, SAMPLERS)):
            if value not in allowed:
                raise UserError(f"hydra.sweeper.{name}={value} is unknown. Choose {' or '.join(allowed)}.")
        self.storage, self.trials, self.at_once = Path(storage), trials, at_once
        self.score, self.direction, self.sampler, self.seed = score, direction, sampler, seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives, and make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run jobs until there are as many as asked for.

        Raises:
            UserError: nothing is to be searched, or the storage is another search's or another process's.
        """
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(arguments)
        swept = [override for override in overrides if override.is_sweep_override()]
        fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
        if not swept:
            raise UserError(
                "hydra/sweeper=optuna: no key has several values. Give one an interval, such as "
                "'optim.optimizer.lr=tag(log,interval(1e-5,1e-2))', or values: head=linear,mlp."
            )
        held = locks.acquire(self.storage.with_name(f"{self.storage.name}.own"))
        if held is None:
            raise UserError(
                f"Another process searches with {self.storage}. Wait for it, or choose another hydra.sweeper.storage."
            )
        try:
            self._search(self._study(swept), {word.get_key_element(): _values(word) for word in swept}, fixed)
        finally:
            locks.release(held)

    def _study(self, swept: Sequence[Override]) -> Any:
        """Return the search that the storage holds, or a new one; jobs that were killed wait to be run again."""
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _drop_cut_line(self.storage)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.storage))),
            study_name="search",
            direction=self.direction,  # type: ignore[arg-type, unused-ignore]
            load_if_exists=True,
        )
        words = [self.score, self.direction, *(str(override.input_line) for override in swept)]
        if (known := study.user_attrs.get(_WORDS, words)) != words:
            raise UserError(
                f"{self.storage} holds another search ({', '.join(known)}) than this one ({', '.join(words)}). "
                "Choose another hydra.sweeper.storage, or remove the file."
            )
        study.set_user_attr(_WORDS, words)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return study

    def _search(self, study: Any, space: dict[str, Any], fixed: Sequence[str]) -> None:
        """Run jobs and tell the study of their scores."""
        while True:
            scored = sum(trial.value is not None for trial in study.trials)
            failed = sum(_ERROR in trial.user_attrs for trial in study.trials)
            if scored + failed >= self.trials:
                return
            if failed >= _HOPELESS and not scored:
                print(f"None of {failed} jobs has a score, so no more are started.", file=sys.stderr)
                return
            study.sampler = self._sampler(len(study.trials))
            asked = [study.ask(space) for _ in range(min(self.at_once, self.trials - scored - failed))]
            jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in asked]
            returned = self.launcher.launch(jobs, initial_job_idx=asked[0].number)
            for trial, job in zip(asked, returned, strict=True):
                value, error = self._scored(job)
                if error:
                    trial.set_user_attr(_ERROR, error)
                study.tell(trial, value, _state(value))

    def _sampler(self, number: int) -> Any:
        """Return what chooses for the jobs from a number on, the same ones however the search came so far."""
        import optuna

        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=self.seed + number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # constant_liar: those that are chosen together lie apart
            return optuna.samplers.TPESampler(seed=self.seed + number, constant_liar=self.at_once > 1)

    def _scored(self, job: JobReturn) -> tuple[float | None, str]:
        """Return a job's score, or None and why it has none."""
        try:
            scores = job.return_value  # raises what the job has raised
        except Exception as error:  # noqa: BLE001 - whatever it was, the other jobs go on
            return None, f"{type(error).__name__}: {error}"
        found = scores if isinstance(scores, dict) else {}
        if "error" in found:
            return None, found["error"]
        value = found.get(self.score)
        if not isinstance(value, int | float) or not math.isfinite(value):
            numbers = ", ".join(key for key, value in found.items() if isinstance(value, int | float)) or "none"
            print(f"hydra.sweeper.score={self.score} is {value}, no number. Of this job: {numbers}.", file=sys.stderr)
            return None, f"{self.score} is {value}"
        return float(value), ""


def _drop_cut_line(path: Path) -> None:
    """Remove what a process that was killed, or a full disk, has left of a line: optuna would refuse the file."""
    if path.exists() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def _state(value: float | None) -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL if value is None else TrialState.COMPLETE


def _values(override: Override) -> Any:
    """Return what a swept key may be, as optuna says it.

    Raises:
        UserError: no number lies in it.
    """
    from optuna import distributions

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if low is None or high is None or low > high or (log and low <= 0):
            positive = " of numbers above 0" if log else ""
            raise UserError(f"{override.input_line}: give an interval{positive}, from the lower to the higher end.")
        if isinstance(low, int) and isinstance(high, int):
            return distributions.IntDistribution(low, high, log=log)
        return distributions.FloatDistribution(low, high, log=log)
    choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
    numbers = [choice for choice in choices if isinstance(choice, int)]
    if isinstance(value, RangeSweep) and not value.shuffle and len(numbers) == len(choices):
        return distributions.IntDistribution(min(numbers), max(numbers), step=abs(int(value.step)))
    return distributions.CategoricalDistribution(choices)

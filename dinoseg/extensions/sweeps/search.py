"""Hydra sweeper that searches with optuna: the values of each job depend on the scores of earlier ones."""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dinoseg.config.nodes import check_arguments
from dinoseg.core.metric import INFINITE_IMAGES, find_infinite_score
from dinoseg.extensions.sweeps.job_results import JobResults
from dinoseg.utils import locks
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import read_regular
from dinoseg.utils.ranges import Count, Range
from dinoseg.utils.wording import printable

SAMPLERS = ("tpe", "random")
DIRECTIONS = ("maximize", "minimize")
_ERROR = "error"  # attribute of a failed trial
Seed = Annotated[int, Range("a whole number from 0 to 2147483647", 0, 2**31 - 1)]
_HOPELESS = 3  # failed jobs after which the search stops if none has succeeded


class Search(Sweeper):
    """Sweeper that searches the values of a sweep; the same command resumes a search, however it ended.

    Args:
        storage: file that stores all jobs.
        trials: total number of jobs.
        at_once: number of jobs whose values are chosen before the first of them has a score.
        score: key of the score in a job's result.
        direction: maximize or minimize.
        sampler: tpe or random.
        seed: of the sampler; the number of the job is added to it.
    """

    hydra_context: HydraContext
    launcher: Launcher
    _job_results: JobResults

    def __init__(
        self, storage: str, trials: Count, at_once: Count, score: str, direction: str, sampler: str, seed: Seed
    ) -> None:
        self.storage, self.trials, self.at_once = storage, trials, at_once
        self.score, self.direction, self.sampler, self.seed = score, direction, sampler, seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes, and create the launcher.

        Raises:
            UserError: an argument of the search is invalid.
        """
        self._check_values()  # not in the constructor, whose errors Hydra buries in its own
        self.hydra_context, self.config = hydra_context, config
        self._job_results = JobResults(config.hydra.sweep.dir)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def _check_values(self) -> None:
        given = dict(vars(self))  # so far the constructor's arguments alone
        check_arguments(f"{__name__}.Search", given, {name: f"hydra.sweeper.{name}" for name in given})
        for name, value, allowed in (
            ("direction", self.direction, DIRECTIONS),
            ("sampler", self.sampler, SAMPLERS),
        ):
            if value not in allowed:
                raise UserError(f"hydra.sweeper.{name}={value} is unknown. Choose {' or '.join(allowed)}.")

    def sweep(self, arguments: list[str]) -> None:
        """Run jobs until the requested number is reached.

        Raises:
            UserError: no key is swept, or the storage belongs to another search or is in use by another process.
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
        space = {word.get_key_element(): _values(word) for word in swept}
        path = Path(self.storage).expanduser()
        held = locks.acquire(path.parent / f"{path.name}.own")
        if held is None:
            raise UserError(
                f"Another process searches with {self.storage}. Wait for it, or choose another hydra.sweeper.storage."
            )
        try:
            words = [self.score, self.direction, *(str(override.input_line) for override in swept)]
            study = open_study(path, self.direction, words, fixed)
            self._repeat(study, self._settle(study), fixed)
            self._search(study, space, fixed)
        finally:
            locks.release(held)

    def _settle(self, study: Any) -> list[Any]:
        """Record the results of jobs that ended after an earlier search did; return the interrupted jobs."""
        from optuna.trial import TrialState

        rows = {row["job"]: row for row in self._job_results.rows()}
        interrupted = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            row = rows.get(trial.number)
            if row is None:
                interrupted.append(trial)
            else:
                error = {"error": row["note"]} if row["note"] else {}
                self._tell(study, trial, *self._read_score(row["returned"] | error))
        return interrupted

    def _repeat(self, study: Any, trials: Sequence[Any], fixed: Sequence[str]) -> None:
        """Run interrupted jobs again under their own numbers, and so in their own folders."""
        # a launcher numbers the jobs of a call one after another
        for _, consecutive in groupby(enumerate(trials), key=lambda pair: pair[1].number - pair[0]):
            self._run_jobs(study, [trial for _, trial in consecutive], fixed)

    def _tell(self, study: Any, trial: Any, value: float | None, error: str) -> None:
        if error:
            study._storage.set_trial_user_attr(trial._trial_id, _ERROR, error)
        study.tell(trial.number, value, _state(value))

    def _search(self, study: Any, space: dict[str, Any], fixed: Sequence[str]) -> None:
        """Run jobs and report their scores to the study."""
        while True:
            scored = sum(trial.value is not None for trial in study.trials)
            failed = sum(_ERROR in trial.user_attrs for trial in study.trials)
            if scored + failed >= self.trials:
                return
            if failed >= _HOPELESS and not scored:
                print(f"No job has a score after {failed} jobs; no more are started.", file=sys.stderr)
                return
            study.sampler = self._sampler(len(study.trials))
            trials = [study.ask(space) for _ in range(min(self.at_once, self.trials - scored - failed))]
            self._run_jobs(study, trials, fixed)

    def _run_jobs(self, study: Any, trials: Sequence[Any], fixed: Sequence[str]) -> None:
        """Run jobs of consecutive numbers and report their scores to the study."""
        jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
        returned = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        for trial, job in zip(trials, returned, strict=True):
            self._tell(study, trial, *self._result(job))

    def _sampler(self, number: int) -> Any:
        """Return the sampler for the jobs from `number` on; interruptions of the search do not change its choices."""
        import optuna

        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=self.seed + number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # constant_liar: spreads values that are chosen together
            return optuna.samplers.TPESampler(seed=self.seed + number, constant_liar=self.at_once > 1)

    def _result(self, job: JobReturn) -> tuple[float | None, str]:
        """Return a job's score and ""; None and the reason if it has no score."""
        try:
            returned = job.return_value  # raises the job's exception
        except Exception as error:  # noqa: BLE001 - of any type: the other jobs continue
            return None, f"{type(error).__name__}: {error}"
        return self._read_score(returned)

    def _read_score(self, scores: Any) -> tuple[float | None, str]:
        found = scores if isinstance(scores, dict) else {}
        if "error" in found:
            return None, found["error"]
        if whole := find_infinite_score(self.score, found):
            rule = f"hydra.sweeper.score={self.score} counts only some of the images. Set hydra.sweeper.score={whole}."
            print(rule, file=sys.stderr)
            return None, rule
        value = found.get(self.score)
        if value is None and found.get(f"{self.score}{INFINITE_IMAGES}"):
            return (math.inf if self.direction == "minimize" else -math.inf), ""
        if not isinstance(value, int | float) or not math.isfinite(value):
            numbers = ", ".join(key for key, value in found.items() if isinstance(value, int | float)) or "none"
            print(f"hydra.sweeper.score={self.score} is {value}, not a number: {numbers}.", file=sys.stderr)
            return None, f"{self.score} is {value}"
        return float(value), ""


def _state(value: float | None) -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL if value is None else TrialState.COMPLETE


def _values(override: Override) -> Any:
    """Return the values of a swept key as an optuna distribution.

    Raises:
        UserError: there are no values.
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
    if not choices:
        raise UserError(f"{override.input_line} holds no value. Give one or more.")
    numbers = [choice for choice in choices if isinstance(choice, int)]
    if isinstance(value, RangeSweep) and not value.shuffle and len(numbers) == len(choices):
        return distributions.IntDistribution(min(numbers), max(numbers), step=abs(int(value.step)))
    return distributions.CategoricalDistribution(choices)


_WORDS, _FIXED = "words", "fixed"  # attributes of a study
_FIRST = b'{"op_code":0,'  # first bytes of optuna's file: the creation of a study
_REMEDY = "Choose another hydra.sweeper.storage, or remove the file."


def open_study(path: Path, direction: str, words: Sequence[str], fixed: Sequence[str]) -> Any:
    """Return the study that a file holds, or a new one.

    Args:
        path: of the file, locked by this process.
        direction: maximize or minimize.
        words: score, direction and swept overrides; a file with other ones holds another search.
        fixed: other overrides; a warning names those that earlier jobs did not have.

    Raises:
        UserError: the file is damaged, or holds something else or another search.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _drop_cut_line(path)
    # left by a process that was killed while writing: optuna would wait for it, with a relative path forever
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    try:
        study = optuna.create_study(
            # optuna's default lock is a link, which only administrators can create on Windows
            storage=JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path)))),
            study_name="search",
            direction=direction,  # type: ignore[arg-type, unused-ignore]
            load_if_exists=True,
        )
        trials = study.get_trials(deepcopy=False)
        known = study.user_attrs.get(_WORDS, [] if trials else words)
    except OSError:
        raise
    except Exception as error:  # any error that damaged lines cause in optuna
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error!s:.200}). {_REMEDY}") from error
    if known != words:
        raise UserError(f"{path} holds another search ({known}) than this one ({words}). {_REMEDY}")
    changed = {*study.user_attrs.get(_FIXED, fixed)} ^ {*fixed}
    if changed and trials:
        names = ", ".join(sorted(changed))
        print(printable(f"Earlier jobs of this search differ in {names}: are scores comparable?"), file=sys.stderr)
    study.set_user_attr(_WORDS, words)
    study.set_user_attr(_FIXED, [*fixed])
    return study


def _drop_cut_line(path: Path) -> None:
    """Remove an incomplete last line, left by a killed process or a full disk: optuna would reject the file."""
    if not path.exists():
        return
    text = read_regular(path)
    if text[: len(_FIRST)] != _FIRST[: len(text)]:
        raise UserError(f"hydra.sweeper.storage={path} does not hold a search. Choose another file.")
    if not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)

"""Optuna's tree-structured Parzen estimator as an engine of `diffaccel.search`; needs the extra ``optuna``.

References:
    | Optuna: A Next-generation Hyperparameter Optimization Framework (2019)
    | https://arxiv.org/abs/1907.10902
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from .extras import extra_package
from .search import Engine, Scored, Space

__all__ = ["OptunaEngine", "optuna_library"]

G = TypeVar("G")
TRIES = 20
"""Trials in a row that may repeat a known candidate."""


def optuna_library() -> Any:
    """Returns the library, its log silenced.

    Raises:
        OptionError: If it is not installed.
    """
    optuna = extra_package("optuna", "optuna", "this engine needs")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class _Decisions:
    """What a space asks, answered by a trial."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def choice(self, name: str, options: int) -> int:
        return int(self.trial.suggest_categorical(name, list(range(options))))

    def number(self, name: str, low: float, high: float) -> float:
        return float(self.trial.suggest_float(name, low, high))


class _Zero:
    """The decisions that give a seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.params = seed, dict[str, Any]()

    def choice(self, name: str, options: int) -> int:
        self.params[name] = self.seed if name == "seed" else 0
        return int(self.params[name])

    def number(self, name: str, low: float, high: float) -> float:
        self.params[name] = 0.0
        return 0.0


class OptunaEngine(Engine[G]):
    """Asks a study for decisions; the seeds of the space come first.

    Arguments:
        space: What is searched.
        seed: Decides everything; a search that goes on from a state makes other candidates than one that
            was not stopped, since the sampler's state is not kept.
    """

    def __init__(self, space: Space[G], seed: int = 0) -> None:
        super().__init__(space)
        self.seed = seed
        self._open: dict[str, Any] = {}
        self._begin(seed)
        for place in range(len(space.seeds())):
            decisions = _Zero(place)
            space.choose(decisions)
            self.study.enqueue_trial(decisions.params)

    def _begin(self, seed: int) -> None:
        optuna = optuna_library()
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        self.study = optuna.create_study(sampler=sampler)
        self._known: set[str] = set()

    def ask(self, count: int = 8) -> list[G]:
        """Returns candidates that have not been asked for; fewer only if it finds no more."""
        optuna, chosen, misses = optuna_library(), list[G](), 0
        while len(chosen) < count and misses < TRIES:
            trial = self.study.ask()
            candidate = self.space.choose(_Decisions(trial))
            key = self._key(candidate)
            if key in self._known:
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                misses += 1
                continue
            self._known.add(key)
            self._open[key] = trial
            chosen.append(candidate)
        return chosen

    def tell(self, candidates: Sequence[G], scores: Sequence[float]) -> None:
        """Takes the scores of candidates; one that is not finite is the worst."""
        optuna = optuna_library()
        for candidate, score in zip(candidates, scores, strict=True):
            score = self._enter(candidate, score).score
            trial = self._open.pop(self._key(candidate), None)
            if trial is not None and score < float("inf"):
                self.study.tell(trial, score)
            elif trial is not None:
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def state_dict(self) -> dict[str, Any]:
        """Returns what was scored and by which decisions, as plain data."""
        optuna = optuna_library()
        distributions = optuna.distributions.distribution_to_json
        trials = [[trial.params, {n: distributions(d) for n, d in trial.distributions.items()}, trial.value]
                  for trial in self.study.get_trials(deepcopy=False)
                  if trial.state == optuna.trial.TrialState.COMPLETE]  # fmt: skip
        scored = [[self.space.to_plain(entry.candidate), entry.score] for entry in self.scored]
        waiting = [trial.system_attrs["fixed_params"] for trial in self.study.get_trials(deepcopy=False)
                   if trial.state == optuna.trial.TrialState.WAITING]  # fmt: skip
        return {"trials": trials, "scored": scored, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a saved state."""
        optuna = optuna_library()
        self._begin(self.seed + len(state["trials"]))
        parse = optuna.distributions.json_to_distribution
        for params, distributions, value in state["trials"]:
            known = {name: parse(text) for name, text in distributions.items()}
            self.study.add_trial(optuna.trial.create_trial(params=params, distributions=known, value=value))
        for params in state["waiting"]:
            self.study.enqueue_trial(params)
        self.scored = [Scored(self.space.from_plain(data), score) for data, score in state["scored"]]
        self._known = {self._key(entry.candidate) for entry in self.scored}

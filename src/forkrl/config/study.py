"""A study file for ``forkrl study``: arms, seeds, measurements and claims on top of a base recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from forkrl.config.recipe import flatten, load_recipe, parse_recipe, read_toml, recipe_differences, recipe_toml
from forkrl.config.sections import FROM_LIST, NonNegative, Section, Seed
from forkrl.config.train import TrainConfig
from forkrl.errors import UserError

START = "start"
_RESERVED = (START, "mean", "training")
"""In a claim: the same runs before training."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SAME_EVALUATION = (
    "task.", "eval.", "model.", "rollout.max_response_tokens", "rollout.stop", "reward.timeout_s", "reward.memory_mb",
    "sandbox.",
)  # fmt: skip
"""Settings that all arms must share: what is measured, and how."""
_NOT_COMPARED = ("runtime", "log", "checkpoint", "seed")
"""The seed, which runs differ in, and sections that change what a run learns by rounding and random numbers only."""
Words = Annotated[tuple[str, ...], FROM_LIST]
Seeds = Annotated[tuple[Seed, ...], FROM_LIST]


class ArmConfig(Section):
    """One arm: the base recipe with other settings."""

    label: str = ""
    """For plots and tables; default: the arm's name."""
    settings: Words = ()
    """Each as on the command line: "selection.rule=random"."""
    seeds: Seeds = ()
    """Of this arm, if it has fewer than the study."""


class MeasurementConfig(Section):
    """A command that measures every trained model."""

    command: Literal["eval", "drift", "decode-temps", "analyze"] = "eval"
    """eval: accuracy, length, and accuracy at equal length; of the others the main figures."""
    arguments: Words = ()
    """Options and settings of the command, without the model and --out."""

    @property
    def words(self) -> list[str]:
        return [self.command, *self.arguments]


class ClaimConfig(Section):
    """A statement about a difference of accuracy, to be judged by its 95% interval."""

    text: str
    """The claim in words."""
    arm: str
    """The arm it is about."""
    than: str
    """The arm to compare with; "start": the same runs before training."""
    says: Literal["better", "not worse", "equal", "worse"]
    """"better": the difference is above margin; "worse": below -margin; "not worse": above -margin; "equal": within."""
    margin: NonNegative = 0.0
    """Share of problems: 0.02 is two points."""
    measurement: str = ""
    """The evaluation that it is about; default: the held-out problems at the end of training."""

    @property
    def region(self) -> tuple[float, float]:
        """The differences for which the claim is true."""
        infinity = float("inf")
        return {
            "better": (self.margin, infinity),
            "not worse": (-self.margin, infinity),
            "equal": (-self.margin, self.margin),
            "worse": (-infinity, -self.margin),
        }[self.says]


class StudyConfig(Section):
    """The whole file."""

    title: str
    """A few words."""
    recipe: str
    """The base recipe, relative to this file."""
    baseline: str
    """The arm that the others are compared with."""
    seeds: Seeds
    """Every arm is trained once with each; at least two."""
    settings: Words = ()
    """Changes of the base recipe for all arms."""
    arms: dict[str, ArmConfig]
    """By name, in the order of plots and tables."""
    measurements: dict[str, MeasurementConfig] = Field(default_factory=dict)
    """By name; made with each trained model."""
    claims: Annotated[tuple[ClaimConfig, ...], FROM_LIST] = ()
    """Judged at the end."""
    paper: str = ""
    """What the paper found, for the page."""

    @model_validator(mode="after")
    def _check_arms(self) -> StudyConfig:
        for name in (*self.arms, *self.measurements):
            if not _NAME.fullmatch(name) or name in _RESERVED:
                raise ValueError(
                    f"{name!r} cannot be a name; begin with a letter or digit, then use letters, digits, -, _ and ., "
                    f"and none of {', '.join(_RESERVED)}"
                )
        if len(self.arms) < 2:
            raise ValueError(f"arms: {len(self.arms)} given; a study compares at least two")
        known = f"the arms are {', '.join(self.arms)}"
        if self.baseline not in self.arms:
            raise ValueError(f"baseline = {self.baseline!r}: is not an arm; {known}")
        for name in self.arms:
            seeds = self.seeds_of(name)
            if len(set(seeds)) < 2:
                raise ValueError(
                    f"seeds of arm {name}: {_listed(seeds) or 'none'}; an interval over runs needs at "
                    f"least two different seeds"
                )
            if len(set(seeds)) < len(seeds):
                twice = next(seed for seed in seeds if seeds.count(seed) > 1)
                raise ValueError(f"seeds of arm {name}: {twice} is given twice; remove one")
            if len(set(seeds) & set(self.seeds_of(self.baseline))) < 2:
                raise ValueError(f"seeds of arm {name}: at least two must be seeds of the baseline {self.baseline}")
        return self

    @model_validator(mode="after")
    def _check_claims(self) -> StudyConfig:
        known = f"the arms are {', '.join(self.arms)}"
        for claim in self.claims:
            for key, arm in (("arm", claim.arm), ("than", claim.than)):
                if arm not in self.arms and (key, arm) != ("than", START):
                    raise ValueError(f"claims: {key} = {arm!r} is not an arm; {known}")
            if claim.arm == claim.than:
                raise ValueError(f"claims: arm and than are both {claim.arm!r}")
            measured = self.measurements.get(claim.measurement)
            if claim.measurement and (measured is None or measured.command != "eval"):
                evaluations = [name for name, each in self.measurements.items() if each.command == "eval"]
                raise ValueError(
                    f"claims: measurement = {claim.measurement!r} is not an evaluation; name one of "
                    f"{', '.join(evaluations) or 'none'}, or leave it out for the held-out problems"
                )
            if claim.than != START and len(set(self.seeds_of(claim.arm)) & set(self.seeds_of(claim.than))) < 2:
                raise ValueError(
                    f"claims: {claim.arm} (seeds {_listed(self.seeds_of(claim.arm))}) and {claim.than} (seeds "
                    f"{_listed(self.seeds_of(claim.than))}) have fewer than two seeds in common; add seeds to an arm"
                )
        return self

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        return self.arms[arm].seeds or self.seeds

    def measurements_of(self, arm: str) -> dict[str, MeasurementConfig]:
        """What is measured after training an arm; with the baseline also the model before training (``NAME@start``).

        Drift reads the starting model anyway.
        """
        if arm != self.baseline:
            return self.measurements
        before = {before_training(name): each for name, each in self.measurements.items() if each.command != "drift"}
        return {**self.measurements, **before}

    def label(self, arm: str) -> str:
        return self.arms[arm].label or arm


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def before_training(measurement: str) -> str:
    """The name of a measurement of the model before training."""
    return f"{measurement}@{START}"


class PlannedRun(NamedTuple):
    """One training run of a study."""

    arm: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


def load_study(path: Path) -> tuple[StudyConfig, list[PlannedRun]]:
    """A study file and its runs, seed by seed, so that every arm has some early.

    Raises:
        UserError: names the file, the key and the remedy; also for arms that do not differ or are on different data.
    """
    study = parse_recipe(StudyConfig, read_toml(path, "study"), str(path))
    recipe = path.parent / study.recipe
    configs = {name: _arm_config(path, study, name, recipe) for name in study.arms}
    _require_comparable(path, configs, study.baseline)
    if study.measurements and (arm := next((arm for arm in configs if configs[arm].checkpoint.kind == "none"), None)):
        raise UserError(
            f'{path}: arm {arm}: with checkpoint.kind = "none" there is no trained model for measurements to open; add '
            f'"checkpoint.kind=weights" to settings'
        )
    every_seed = dict.fromkeys(seed for arm in study.arms for seed in study.seeds_of(arm))
    runs = [
        PlannedRun(arm, seed, configs[arm].model_copy(update={"seed": seed}))
        for seed in every_seed
        for arm in study.arms
        if seed in study.seeds_of(arm)
    ]
    return study, runs


def learning_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a run learns; runs with the same ones and the same seed are the same run."""
    return {key: value for key, value in recipe_toml(config).items() if key not in _NOT_COMPARED}


def early_ends(settings: dict[str, Any]) -> dict[str, float]:
    """Those of a recipe's settings that may end a run before training.steps; runs with them may differ in length."""
    flat = flatten(settings)
    return {key: flat[key] for key in ("eval.patience", "training.epochs") if flat.get(key)}


def _arm_config(path: Path, study: StudyConfig, name: str, recipe: Path) -> TrainConfig:
    words = (*study.settings, *study.arms[name].settings)
    if any(word.partition("=")[0].strip() == "seed" for word in words):
        raise UserError(f"{path}: arm {name}: the seed is set by seeds; remove seed= from settings")
    try:
        return load_recipe(TrainConfig, recipe, words)
    except UserError as error:
        raise UserError(f"{path}: arm {name}: {str(error).replace('command line: ', '')}") from None


def _require_comparable(path: Path, configs: dict[str, TrainConfig], baseline: str) -> None:
    """Reject two arms with the same settings, and arms whose prompts, evaluation or model differ."""
    seen: dict[str, str] = {}
    for name, config in configs.items():
        settings = learning_settings(config)
        text = repr(settings)
        if text in seen:
            raise UserError(f"{path}: arms {seen[text]} and {name} have the same settings; change or remove one")
        seen[text] = name
        for key, value in early_ends(settings).items():
            raise UserError(f"{path}: arm {name}: with {key} = {value:g} runs differ in length; set it to 0")
        different = [
            each for each in recipe_differences(configs[baseline], config) if each.startswith(SAME_EVALUATION)
        ]  # fmt: skip
        if different:
            raise UserError(
                f"{path}: arm {name} is not measured as the baseline {baseline} ({different[0]}); arms "
                f"must be paired by problem, so make it a study of its own"
            )

"""The two ways a ForkRL command can end that are not a bug."""

from __future__ import annotations


class UserError(Exception):
    """Something only the user can mend. The command line prints it as one line and exits with 2.

    Say what was found, where, and what to do about it: "recipe.toml: loss.clip_hgh is not a setting; did you mean
    loss.clip_high?".
    """


class TrainingHalted(Exception):
    """Training cannot go on, as with a NaN loss. What was saved before stays as it is; exit code 1."""


class ReplicaLost(TrainingHalted):
    """A further process has died. Nothing is wrong with what was saved: the run can be resumed."""


class NothingToLearn(TrainingHalted):
    """No group of responses has a gradient. The weights are sound, so the finished steps are worth saving."""

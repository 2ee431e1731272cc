"""How responses become rewards: the tables ``[reward]`` and ``[sandbox]`` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from forkrl.config.secret_values import reject_written_secrets
from forkrl.config.sections import FROM_LIST, Count, Positive, PositiveInt, Section


class RewardTerm(Section):
    """A reward in addition to the task's score (docs/verifiers.md)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    """Of its metric, reward/terms/NAME: letters, digits, "_" and "-"."""
    verifier: str
    """As task.verifier: import path "module:function" of (answer, response) -> number in [0, 1], or the address of a
    server. "forkrl.rewards.rubric:judge" asks a language model."""
    options: dict[str, Any] = Field(default={})
    """Additional arguments of the function by name; ${NAME} in text is replaced by that environment variable."""
    weight: float = 1.0
    """The number is multiplied by this and added to the score; may be negative. A response that cannot be judged counts
    as 0, and as 1 where this is negative."""

    @model_validator(mode="after")
    def _holds_no_secrets(self) -> RewardTerm:
        reject_written_secrets(f"reward.terms ({self.name}): verifier", self.verifier)
        reject_written_secrets(f"reward.terms ({self.name}): options", self.options)
        return self


class RewardConfig(Section):
    overlong_cache: Count = 4096
    """L_cache: over the last L_cache tokens before L_max the reward falls linearly to -1; 0: no penalty."""
    workers: PositiveInt = 1
    """Verifier processes."""
    timeout_s: Positive = 10.0
    """Wall-clock limit for judging one response; a worker that exceeds it is killed and replaced."""
    memory_mb: Annotated[int, Field(ge=64)] = 2048
    """Address space of one verifier process."""
    terms: Annotated[tuple[RewardTerm, ...], FROM_LIST] = ()
    """Rewards that are added to the task's score in training, each a table [[reward.terms]] (docs/verifiers.md)."""

    @model_validator(mode="after")
    def _terms_have_different_names(self) -> RewardConfig:
        names = [term.name for term in self.terms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"reward.terms: two of them have the name {twice!r}; rename one")
        return self


class SandboxConfig(Section):
    """Where code rewards run programs, and within which limits (docs/code-rewards.md)."""

    server: str = ""
    """Address of a SandboxFusion server, such as "http://localhost:8080", with credentials as ${NAME}. Empty:
    bubblewrap on this machine."""
    python: str = ""
    """Python interpreter that runs the programs, with only its standard library. Empty: the one that runs ForkRL."""
    seconds: Annotated[float, Field(ge=0.1)] = 6.0
    """CPU time for one test; its wall-clock limit is twice this."""
    total_seconds: Annotated[float, Field(ge=0.1)] = 60.0
    """Wall-clock limit for all tests of one program; a program that exceeds it fails."""
    memory_mb: Annotated[int, Field(ge=64)] = 1024
    """Memory of one program with all its processes, in MiB; at least 256 below reward.memory_mb."""
    output_kb: PositiveInt = 16384
    """KiB that a program may print in one test; twice the expected output is always allowed."""
    files_mb: PositiveInt = 64
    """MiB of files that a program may have at a time; they are deleted after the test."""
    processes: PositiveInt = 32
    """Processes and threads of one program at a time."""

    @model_validator(mode="after")
    def _holds_no_secrets(self) -> SandboxConfig:
        reject_written_secrets("sandbox.server", self.server)
        return self

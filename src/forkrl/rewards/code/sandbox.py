"""Opens the sandbox that a recipe asks for. There is no third kind, which would run programs unprotected."""

from __future__ import annotations

import time
from pathlib import Path

from forkrl.config import SandboxConfig
from forkrl.errors import UserError
from forkrl.rewards.code.bubblewrap import Bubblewrap
from forkrl.rewards.code.programs import Sandbox, SandboxUnavailableError

_UBUNTU = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_QUESTION, _ANSWER = "print(6 * 7)", b"42\n"


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox of a recipe, not yet tried.

    Raises:
        UserError: there is none here; says how to get one.
    """
    if config.server:
        from forkrl.rewards.code.sandbox_fusion import SandboxFusion  # here, as it brings an HTTP client along

        return SandboxFusion(config)
    return Bubblewrap(config)


def require_sandbox(config: SandboxConfig) -> Sandbox:
    """The sandbox of a recipe, after it has run a program.

    Raises:
        UserError: there is none, or it does not work; says why and how to mend it.
    """
    sandbox = open_sandbox(config)
    try:
        outcome = sandbox.run_program(_QUESTION, "", max_output=1 << 10, deadline=time.monotonic() + 60)
    except SandboxUnavailableError as error:
        raise UserError(f"code rewards need a sandbox, and it does not work: {error}; {_remedy(config)}") from None
    if outcome.output != _ANSWER or outcome.failure:
        ended = f"failed ({outcome.failure})" if outcome.failure else "succeeded"
        raise UserError(
            f"code rewards need a sandbox, and {_QUESTION} printed {outcome.output[:50]!r} and {ended} there; "
            f"{_remedy(config)}"
        )
    return sandbox


def _remedy(config: SandboxConfig) -> str:
    if config.server:
        return f"is sandbox.server = {config.server!r} the address of a SandboxFusion server?"
    if _UBUNTU.exists() and _UBUNTU.read_text(encoding="ascii").strip() == "1":
        return (
            "Ubuntu forbids programs to make user namespaces: sudo sysctl -w "
            "kernel.apparmor_restrict_unprivileged_userns=0 (and in /etc/sysctl.d/, to keep it), or set sandbox.server "
            "to the address of a SandboxFusion server"
        )
    return (
        "bubblewrap must be able to make user namespaces (in a container: --privileged, or --security-opt "
        "seccomp=unconfined), or set sandbox.server to the address of a SandboxFusion server"
    )

"""Whether bubblewrap works on this machine, for tests that cannot do without."""

from __future__ import annotations

import pytest

from forkrl.config import SandboxConfig
from forkrl.errors import UserError
from forkrl.rewards.sandbox import require_sandbox


def why_no_bubblewrap() -> str:
    """Empty where it works."""
    try:
        require_sandbox(SandboxConfig())
    except UserError as error:
        return str(error)
    return ""


_REASON = why_no_bubblewrap()
needs_bubblewrap = pytest.mark.skipif(bool(_REASON), reason=_REASON)

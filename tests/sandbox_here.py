"""Whether this machine lets bubblewrap work, for tests that cannot do without.

It is asked in the plainest way: where bubblewrap works and our sandbox does not, the tests run and fail.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest


def _why_not() -> str:
    """Empty where it works."""
    found = shutil.which("bwrap")
    if found is None:
        return "there is no bubblewrap here: apt-get install bubblewrap"
    plain = [found, "--unshare-user", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    done = subprocess.run(plain, capture_output=True, text=True, check=False)
    return f"bubblewrap does not work here: {done.stderr.strip()}" if done.returncode else ""


_REASON = _why_not()
needs_bubblewrap = pytest.mark.skipif(bool(_REASON), reason=_REASON)

"""A custom verifier: as a function, and behind an HTTP server. See docs/verifiers.md.

python examples/own_verifier.py            # scores a few responses both ways
python examples/own_verifier.py 8000       # serves; in a recipe: task.verifier = "http://127.0.0.1:8000/"

In a recipe the function is task.verifier = "own_verifier:near", with task.verifier_options.tolerance = 0.01.
own_verifier.py must be in the folder where forkrl is started, or on PYTHONPATH.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from forkrl.config import RewardConfig
from forkrl.rewards import VerifierPool, open_verifier
from forkrl.types import Judgement, Prompt, VerifierSpec

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def near(answer: str, response: str, *, tolerance: float = 0.0) -> Judgement:
    """1 if the last number of the response equals the answer within the tolerance."""
    numbers = NUMBER.findall(response[-1000:])
    if not numbers:
        return Judgement(0.0, answer="")
    right = abs(float(numbers[-1]) - float(answer)) <= tolerance
    return Judgement(float(right), answer=f"{float(numbers[-1]):g}")


class JudgeByPost(BaseHTTPRequestHandler):
    """POST {"answer", "response"} returns {"score", "answer"}."""

    protocol_version = "HTTP/1.1"  # keeps connections open

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            judgement = near(asked["answer"], asked["response"], tolerance=0.01)
        except ValueError as error:  # any status but 200 is a failure that names it; 429 and 5xx are retried first
            self.send_error(422, str(error))
            return
        body = json.dumps(judgement._asdict()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """No log line per request."""


def show(title: str, pool: VerifierPool) -> None:
    """Score in the pool's processes; this process is not blocked."""
    batch = [
        (Prompt(id="pi", text="What is pi, roughly?", answer="3.14159"), "It is about 3.14"),
        (Prompt(id="pi", text="What is pi, roughly?", answer="3.14159"), "Let me think."),
        (Prompt(id="odd", text="Who knows?", answer="not a number"), "It is 42"),
    ]
    scores = pool.submit(batch)
    print(title)
    for (prompt, response), score in zip(batch, scores.result(), strict=True):
        print(f"  {prompt.id}: {response!r} {score}")
    print(f"  failures: {dict(pool.failures)}")


def main() -> None:
    if sys.argv[1:]:
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), JudgeByPost).serve_forever()
    config = RewardConfig(workers=2, timeout_s=5)
    function = VerifierSpec("own_verifier:near", {"tolerance": 0.01})
    with open_verifier({"": function}, config) as pool:
        show("function", pool)
    with ThreadingHTTPServer(("127.0.0.1", 0), JudgeByPost) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        endpoint = VerifierSpec("forkrl.rewards.endpoint:verify_at_endpoint", {"url": url})
        with open_verifier({"": endpoint}, config) as pool:
            show("server", pool)
        server.shutdown()


if __name__ == "__main__":
    main()

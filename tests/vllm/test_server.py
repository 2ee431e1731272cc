"""A server that runs a real vLLM: ``forkrl eval --server``, and ``ForkTemperatureV1`` in it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from scipy import stats

from forkrl.cli import main
from forkrl.config import ModelConfig
from forkrl.model.locations import model_location
from forkrl.model.policy import Policy, open_policy
from forkrl.rollout.fork_temperature import ForkTemperature, entropy_of
from tests.processes import wait_until

LIMIT_S = 600.0
MODEL = "embedded:countdown-base"
PROMPT = "3 7 5:10?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    command = [  # what vllm serve starts; that asks for the metadata of a package named vllm, and this one is vllm-cpu
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_location(MODEL),
        "--served-model-name", MODEL,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
        "--logits-processors", "forkrl.rollout.vllm_fork_temperature:ForkTemperatureV1",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            assert wait_until(lambda: process.poll() is not None or answers(url), LIMIT_S), log.read_text()[-4000:]
            assert process.poll() is None, log.read_text()[-4000:]
            yield url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def policy() -> Policy:
    return open_policy(ModelConfig(path=MODEL), "cpu")


def evaluate(out: Path, *argv: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The responses of ``forkrl eval`` at temperature 0, by question and sample."""
    task = ("--task", "countdown", "--problems", "16", "--samples", "1", "--temperature", "0", "--max-tokens", "64")
    assert main(["eval", MODEL, *task, "--out", str(out), *argv]) == 0
    [file] = (out / "responses").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {(row["question"], row["sample"]): row for row in rows}


def test_an_evaluation_gets_the_responses_that_pytorch_gives(server: str, tmp_path: Path) -> None:
    there = evaluate(tmp_path / "there", "--server", server)
    here = evaluate(tmp_path / "here", "runtime.device=cpu", "runtime.workers=1", "runtime.threads=1")
    same = ("text", "tokens", "finished")
    assert {key: [row[name] for name in same] for key, row in there.items()} == {
        key: [row[name] for name in same] for key, row in here.items()
    }
    assert {row["entropy"] for row in there.values()} == {None}
    assert json.loads((tmp_path / "there" / "results.json").read_text())["settings"]["engine"] == "server"


def complete(server: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server}/v1/completions", json={"model": MODEL, "prompt": PROMPT} | fields, timeout=LIMIT_S)


def first_logits(policy: Policy) -> torch.Tensor:
    ids = policy.tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        return policy.logits(policy.hidden_states(torch.tensor([ids]))[0, -1:])[0]


@pytest.mark.parametrize(("high", "low", "as_list"), [(2.0, 0.5, False), (0.5, 2.0, True)])
def test_a_fork_temperature_is_that_of_the_request(
    server: str, policy: Policy, high: float, low: float, as_list: bool
) -> None:
    logits_V, count = first_logits(policy), 1000
    threshold = float(entropy_of(logits_V)) * (0.9 if high > low else 1.1)  # so 2.0 applies, and not 0.5
    probs_V = ForkTemperature(high, low, threshold)(None, logits_V.double()).softmax(-1)
    answer = complete(
        server, max_tokens=1, n=count, seed=1, temperature=1, top_k=-1, logprobs=0, return_tokens_as_token_ids=True,
        vllm_xargs={"fork_temperature": [high, low, threshold] if as_list else f"{high},{low},{threshold}"},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    drawn = Counter(int(each["logprobs"]["tokens"][0].removeprefix("token_id:")) for each in answer.json()["choices"])
    often_V = probs_V * count >= 5
    usual = [drawn[token] for token in often_V.nonzero()[:, 0].tolist()]
    expected = [*(probs_V[often_V] * count).tolist(), float(probs_V[~often_V].sum() * count) + 1e-9]
    assert stats.chisquare([*usual, count - sum(usual)], expected).pvalue > 1e-3


def test_a_request_that_contradicts_itself_is_rejected(server: str) -> None:
    answer = complete(server, max_tokens=1, temperature=0.6, vllm_xargs={"fork_temperature": "1.0,0.3,0.672"})
    assert answer.status_code == 400
    assert "temperature = 0.6 along with fork_temperature: set it to 1" in answer.text

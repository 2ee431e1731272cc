"""Time and peak memory of ``forkrl analyze`` against the number of tokens, and what a rerun and a report cost.

    python -m benchmarks.analyze [--tokens 50000 200000] [--vocabulary 151936] [--large-tokens 2000 8000]

Every case is a command in a process of its own, its time that of the whole process, imports included. "embedded" is the
embedded base model generating its own responses; "ready" measures responses that are there. "large vocabulary" is a
random model of one layer with the vocabulary of Qwen3, on ready responses: its logits are what memory would be spent
on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._record import describe_setting, write_result

TOKENS_PER_RESPONSE = 79  # of the embedded model
# VmHWM, not getrusage: that counts the memory of the process that started this one as well.
_RUN = (
    "import resource, sys; from forkrl.cli import main; code = main(sys.argv[1:]);"
    "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'));"
    "print('peak', peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--large-tokens", type=int, nargs="+", default=[2_000, 8_000])
    options = parser.parse_args()
    setting = describe_setting()
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for tokens in options.tokens:
            cases += embedded_cases(folder / f"embedded-{tokens}", tokens)
        make_large_model(folder / "model", options.vocabulary)
        for tokens in options.large_tokens:
            cases.append(large_case(folder, tokens))
    show(cases)
    print(write_result("analyze", setting, cases))


def embedded_cases(out: Path, tokens: int) -> list[dict[str, Any]]:
    """The whole analysis, and the same command once more, which finds all parts done."""
    samples = max(round(tokens / (512 * TOKENS_PER_RESPONSE)), 1)
    argv = ["embedded:countdown-base", "--recipe", "recipes/countdown.toml", "--problems", "512"]
    argv += ["--samples", str(samples), "--out", str(out)]
    return [timed("embedded", argv, out), timed("embedded, again", argv, out)]


def large_case(folder: Path, tokens: int) -> dict[str, Any]:
    """Ready responses of random ids, 500 tokens each, to the model with the large vocabulary."""
    rng = random.Random(tokens)
    rows = ({"prompt": "a b c", "token_ids": rng.choices(range(1000), k=500)} for _ in range(tokens // 500))
    responses = folder / f"responses-{tokens}.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / f"large-{tokens}"
    return timed("large vocabulary", [str(folder / "model"), "--responses", str(responses), "--out", str(out)], out)


def timed(name: str, argv: list[str], out: Path) -> dict[str, Any]:
    """One command with its seconds, tokens, report size, and the peak memory of it and of its largest child."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _RUN, "analyze", *argv], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    own, child = map(int, done.stdout.splitlines()[-1].split()[1:])
    return {
        "case": name,
        "tokens": int(json.loads((out / "results.json").read_text())["facts"]["tokens"]),
        "seconds": seconds,
        "peak_mib": own / 1024,
        "peak_child_mib": child / 1024,
        "report_mb": (out / "report.html").stat().st_size / 1e6,
    }


def make_large_model(folder: Path, vocabulary: int) -> None:
    """One layer of width 64, random weights, and the tokenizer of the embedded model (ids beyond it have no text)."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from forkrl.model.locations import model_location

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096, "tie_word_embeddings":
        True,
    }  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_location("embedded:countdown-base")).save_pretrained(folder)


def show(cases: list[dict[str, Any]]) -> None:
    """The cases as a table."""
    table = Table("case", "tokens", "seconds", "peak MiB", "of a child", "report MB")
    for case in cases:
        table.add_row(
            case["case"],
            f"{case['tokens']:,}",
            f"{case['seconds']:.1f}",
            f"{case['peak_mib']:.0f}",
            f"{case['peak_child_mib']:.0f}",
            f"{case['report_mb']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

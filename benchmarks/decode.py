"""Tokens a second of decoding alone, beside ``model.generate``, with the same model and the same prompts.

    python -m benchmarks.decode [--prompts 32] [--group 8] [--tokens 128] [--rounds 3]
    python -m benchmarks.decode --model FOLDER --precision bf16 --prompts 1 --group 1 --ways forkrl generate
    python -m benchmarks.decode --model 28x1024 --device cuda --ways forkrl generate vLLM --tokens 512

The model is the embedded base model, a folder (both get problems of Countdown as prompts) or, as LAYERSxWIDTH, random
weights in a Qwen3 shape (which seldom stop, so that every response is of full length). Sampling is from the full
softmax at temperature 1. Each turn is a fresh process that decodes once to warm up and then ``--repeats`` times; the
ways take turns, round after round, on the same cores. What counts is the tokens of the responses up to their ends, a
second; a second of CPU time, for ways of one process on a CPU, depends less on what else runs on the machine. "no
entropies" is ForkRL with log-probs alone, to see what the entropies cost. One thread each; "threads" and "workers" take
all cores, the latter as processes of one thread.

For a GPU, and asked for by name: "vLLM" is given the same shape and prompts, ends where the others do, and reports no
log-probs; random weights are drawn on another device than those of the other ways.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks._record import describe_setting, write_result
from forkrl.parallel.threads import available_cores

WAYS = {
    "forkrl": 1,
    "forkrl, no entropies": 1,
    "generate": 1,
    "generate, static cache": 1,
    "generate, continuous batching": 1,
    "forkrl, workers": 0,
    "generate, threads": 0,
    "generate, static cache, threads": 0,
    "vLLM": 0,
}
"""Threads of each way; 0 for as many as there are cores."""


def main() -> None:
    options = parse_options()
    if options.work:
        print(json.dumps(measure(options)))
        return
    setting, cases = {**describe_setting(), "seed": options.seed}, []
    for number in range(1, options.rounds + 1):
        for way in options.ways:
            cases.append({"way": way, "round": number, **measure_apart(options, way)})
            print(json.dumps(cases[-1]), flush=True)
            path = write_result(options.name, setting, cases)
    show(cases, options.ways)
    print(f"written to {path}")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoding beside model.generate.")
    parser.add_argument(
        "--model", default="embedded:countdown-base", help="or a folder, or LAYERSxWIDTH: random weights"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="at most, of a response")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=[way for way in WAYS if way != "vLLM"])
    parser.add_argument("--repeats", type=int, default=3, help="decodes of a turn that count")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="decode", help="of the result")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure_apart(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """One turn of one way, in a process of its own."""
    threads = WAYS[way] or available_cores()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.decode", "--work", way]
    for key in ("model", "device", "precision", "prompts", "group", "tokens", "repeats", "seed"):
        command += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"threads": threads, "failed": (done.stderr.strip() or "no message").splitlines()[-1]}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"threads": threads, **figures}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1 if options.work == "forkrl, workers" else int(os.environ["OMP_NUM_THREADS"]))
    decode = prepare(options)
    decode(options.seed)
    seconds, cpu_seconds, tokens = [], [], []
    for repeat in range(options.repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        tokens.append(decode(options.seed + repeat))
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    figures: dict[str, Any] = {
        "tokens_per_second": median_speed(tokens, seconds), "seconds": seconds, "tokens": tokens
    }  # fmt: skip
    if options.device == "cpu" and options.work not in ("forkrl, workers", "vLLM"):  # these have other processes
        figures |= {"tokens_per_cpu_second": median_speed(tokens, cpu_seconds), "cpu_seconds": cpu_seconds}
    if options.device == "cuda" and options.work != "vLLM":  # which has a process of its own there
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def median_speed(tokens: list[int], seconds: list[float]) -> float:
    return statistics.median(count / second for count, second in zip(tokens, seconds, strict=True))


def prepare(options: argparse.Namespace) -> Callable[[int], int]:
    """A function that decodes the whole batch with a seed, and returns how many tokens it made."""
    if options.work == "vLLM":
        require_vllm()
        options.device = "cpu"  # vLLM reads the weights from a folder, into memory that is all its own
    policy = random_policy(options) if is_shape(options.model) else open_embedded(options)
    texts_P = random_texts(options) if is_shape(options.model) else countdown_texts(options)
    if options.work == "vLLM":
        return prepare_vllm(policy, texts_P, options)
    if options.work == "generate, continuous batching":
        return prepare_continuous(policy, texts_P, options)
    if options.work.startswith("generate"):
        return prepare_generate(policy, texts_P, options)
    if options.work == "forkrl, no entropies":
        leave_out_entropies()
    return prepare_forkrl(policy, texts_P, options)


def prepare_forkrl(policy: Any, texts_P: list[str], options: argparse.Namespace) -> Callable[[int], int]:
    from forkrl.parallel.workers import Workers
    from forkrl.rollout import EmbeddedEngine
    from forkrl.types import Prompt, SamplingParams

    count = available_cores() if options.work == "forkrl, workers" else 1
    engine = EmbeddedEngine(Workers(policy, count=count), max_prompt_tokens=1024, max_sequences=4096)
    prompts = [Prompt(str(place), text, "") for place, text in enumerate(texts_P)]

    def decode(seed: int) -> int:
        generator = torch.Generator(policy.device).manual_seed(seed)
        sampling = SamplingParams(options.tokens)
        groups = engine.generate(prompts, group_size=options.group, sampling=sampling, generator=generator)
        return sum(len(rollout) for group in groups for rollout in group.rollouts)

    return decode


def leave_out_entropies() -> None:
    """Sampling as it is, but for the entropies."""
    embedded: Any = importlib.import_module("forkrl.rollout.embedded")

    def draw_only(logits_SV: Tensor, sampling: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        logprobs_SV = logits_SV.log_softmax(-1)
        probs_SV = logprobs_SV.exp()
        drawn_S = probs_SV.div_(torch.empty_like(probs_SV).exponential_(generator=generator)).argmax(-1)
        return drawn_S, logprobs_SV.gather(-1, drawn_S[:, None])[:, 0], torch.zeros_like(probs_SV[:, 0])

    embedded.sample_tokens = draw_only


def prepare_generate(policy: Any, texts_P: list[str], options: argparse.Namespace) -> Callable[[int], int]:
    """``model.generate`` as its users call it: one padded batch, the model's own attention."""
    policy.model.set_attn_implementation("sdpa")
    ids_S = [policy.tokenizer.encode(text) for text in texts_P for _ in range(options.group)]
    longest, end = max(map(len, ids_S)), policy.tokenizer.eos_token_id
    input_ids = torch.tensor([[end] * (longest - len(ids)) + ids for ids in ids_S], device=policy.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in ids_S], device=policy.device)
    cache = {"cache_implementation": "static"} if "static" in options.work else {}

    def decode(seed: int) -> int:
        torch.manual_seed(seed)
        with policy.autocast():
            output = policy.model.generate(
                input_ids=input_ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=options.tokens, eos_token_id=end, pad_token_id=end, **cache,
            )  # fmt: skip
        ended_ST = output[:, longest:] == end
        before_ST = ended_ST.cumsum(1) - ended_ST.long()
        return int((before_ST == 0).sum())

    return decode


def prepare_continuous(policy: Any, texts_P: list[str], options: argparse.Namespace) -> Callable[[int], int]:
    """``model.generate_batch``: slots are filled again as responses end, with a paged cache."""
    from transformers import GenerationConfig

    policy.model.set_attn_implementation("sdpa")
    end = policy.tokenizer.eos_token_id
    ids_S = [list(policy.tokenizer.encode(text)) for text in texts_P for _ in range(options.group)]
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=options.tokens, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip

    def decode(seed: int) -> int:
        torch.manual_seed(seed)
        with policy.autocast():
            made = policy.model.generate_batch(inputs=ids_S, generation_config=settings, progress_bar=False)
        if len(made) != len(ids_S):
            raise RuntimeError(f"generate_batch returned {len(made)} of {len(ids_S)} responses")
        return sum(len(output.generated_tokens) for output in made.values())

    return decode


def require_vllm() -> None:
    try:
        importlib.import_module("vllm")
    except ImportError as error:
        raise SystemExit(f"vLLM cannot be imported here ({error}): pip install 'forkrl[vllm]'") from None


def prepare_vllm(policy: Any, texts_P: list[str], options: argparse.Namespace) -> Callable[[int], int]:
    """``vllm.LLM`` as its users call it, from a folder that is gone once it has been read."""
    import vllm

    ids_P = [list(policy.tokenizer.encode(text)) for text in texts_P]
    with tempfile.TemporaryDirectory() as folder:
        policy.model.save_pretrained(folder)
        engine = vllm.LLM(
            model=folder, skip_tokenizer_init=True, dtype={"bf16": "bfloat16", "fp32": "float32"}[options.precision],
            max_model_len=max(map(len, ids_P)) + options.tokens, generation_config="vllm", disable_log_stats=True,
        )  # fmt: skip
    sampling = {"n": options.group, "temperature": 1.0, "max_tokens": options.tokens, "detokenize": False}
    ends = {"stop_token_ids": [policy.tokenizer.eos_token_id], "ignore_eos": True}  # ours alone ends, not the folder's

    def decode(seed: int) -> int:
        params = vllm.SamplingParams(seed=seed, **sampling, **ends)
        made = engine.generate([{"prompt_token_ids": ids} for ids in ids_P], params, use_tqdm=False)
        return sum(len(response.token_ids) for request in made for response in request.outputs)

    return decode


def is_shape(model: str) -> bool:
    return model.replace("x", "", 1).isdigit()


def open_embedded(options: argparse.Namespace) -> Any:
    from forkrl.config import ModelConfig
    from forkrl.model.policy import open_policy

    return open_policy(ModelConfig(path=options.model, precision=options.precision), options.device)


def countdown_texts(options: argparse.Namespace) -> list[str]:
    from forkrl.tasks.countdown import countdown_task

    return [problem.text for problem in countdown_task().train[: options.prompts]]


def random_policy(options: argparse.Namespace) -> Any:
    """Random weights in a shape and the vocabulary of Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from forkrl.model.policy import Policy

    layers, width = map(int, options.model.split("x"))
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151_936, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 128), head_dim=128,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    tokenizer: Any = Numerals()
    return Policy(model.eval(), tokenizer, options.precision)


class Numerals:
    """A tokenizer whose texts are numbers: random weights know no words."""

    eos_token_id = 151_645
    bos_token_id = unk_token_id = None
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def encode(self, text: str, **ignored: Any) -> list[int]:
        return [int(numeral) for numeral in text.split()]

    def decode(self, ids: list[int], **ignored: Any) -> str:
        return " ".join(map(str, ids))


def random_texts(options: argparse.Namespace) -> list[str]:
    generator = torch.Generator().manual_seed(options.seed)
    ids_PT = torch.randint(1000, 100_000, (options.prompts, 64), generator=generator)
    return [Numerals().decode(ids) for ids in ids_PT.tolist()]


def show(cases: list[dict[str, Any]], ways: list[str]) -> None:
    """A line for each way, and how many times faster than it ForkRL with as many cores is."""

    def speed(way: str, per: str = "tokens_per_second") -> float:
        made = [case[per] for case in cases if case["way"] == way and per in case]
        return statistics.median(made) if made else float("nan")

    for way in ways:
        failed = next((case["failed"] for case in cases if case["way"] == way and "failed" in case), None)
        if failed:
            print(f"{way:32} failed: {failed}")
            continue
        ours = "forkrl, workers" if not WAYS[way] and "forkrl, workers" in ways else "forkrl"
        ratio = f"{speed(ours) / speed(way):6.2f} ({ours})" if ours in ways else ""
        cpu = speed(way, "tokens_per_cpu_second")
        print(f"{way:32} {speed(way):9,.0f} tokens/s {cpu:9,.0f} tokens/CPU s {ratio}")


if __name__ == "__main__":
    main()

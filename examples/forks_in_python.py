"""Where a model forks, from Python: measure responses, list token types, compare two models, colour a response.

python examples/forks_in_python.py
"""

from __future__ import annotations

import rich
import torch

from forkrl import analysis
from forkrl.config import ModelConfig
from forkrl.model.policy import open_policy
from forkrl.report import coloured_response
from forkrl.report.analyze_page import entropy_histogram

# Any transformers model and tokenizer works; this one ships with ForkRL.
policy = open_policy(ModelConfig(path="embedded:countdown-base"))
model, tokenizer = policy.model, policy.tokenizer

prompts = ["2 5 9:90?", "2 5 9:90?", "3 5 7:26?"]
responses = [
    "5*2=10 [9 10], 9*10=90 [90] 90:90 !",
    "9-5=4 [2 4], 4*2=8 [8] 8:90 ?",
    "3*7=21 [5 21], 5+21=26 [26] 26:26 !",
]
tokens = analysis.measure_tokens(model, tokenizer, prompts, responses, correct=[True, False, True])

summary = analysis.entropy_summary(tokens)
print(summary.round(4))
threshold = summary["value"]["percentile_80"]
print(analysis.token_types(tokens, min_count=3, threshold=threshold).round(3))
print(analysis.correct_against_incorrect(tokens, threshold).round(3).T)
entropy_histogram(analysis.entropy_histogram(tokens), threshold).savefig("histogram.svg")

# The same tokens under changed weights, as after training.
with torch.no_grad():
    model.get_output_embeddings().weight.mul_(1.5)
sharper = analysis.measure_tokens(model, tokenizer, prompts, responses)
before, after = (torch.tensor(frame["entropy"].to_numpy()) for frame in (tokens, sharper))
everywhere = torch.ones(len(before), dtype=torch.bool)
print(f"overlap of the top fifth: {analysis.overlap_ratio(before, after, everywhere):.2f}")
print(analysis.entropy_change_by_percentile(before, after, everywhere, bins=5).round(3))

first = tokens[(tokens["prompt"] == 0) & (tokens["sample"] == 0)]
rich.print(coloured_response(first["text"].tolist(), first["entropy"].tolist()))

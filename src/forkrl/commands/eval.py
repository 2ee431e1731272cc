"""``forkrl eval``: list benchmarks or run an evaluation. Listing imports neither torch nor matplotlib."""

from __future__ import annotations

from forkrl.commands.options import EvalOptions
from forkrl.evaluation.benchmarks import BENCHMARKS, GYM


def run_eval(options: EvalOptions) -> int:
    if options.list_benchmarks:
        print(list_benchmarks())
        return 0
    from forkrl.commands.evaluate import evaluate_model, make_page
    from forkrl.commands.work_folder import present

    results = evaluate_model(options)
    return present(results.folder, make_page(results))


def list_benchmarks() -> str:
    rows = [("name", "questions", "data set", "verifier")]
    for each in BENCHMARKS.values():
        rows.append((each.name, f"{each.expected_questions:,}", each.hub, each.verifier.path.rpartition(":")[2]))
    rows.append((f"{GYM}NAME", "any", "made by reasoning-gym", "verify_gym"))
    return "\n".join(f"{name:13}  {count:>9}  {source:34}  {verifier}" for name, count, source, verifier in rows)

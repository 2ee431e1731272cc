"""``forkrl preview``: data, prompts, responses and pass rates of a recipe, before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forkrl.commands.options import PreviewOptions
from forkrl.commands.work_folder import require_usable
from forkrl.config import TrainConfig
from forkrl.config.recipe import load_recipe
from forkrl.errors import UserError
from forkrl.model.locations import model_location
from forkrl.store.atomic import finite

SAMPLING = {"engine", "temperature", "top_p", "top_k", "max_response_tokens"}


def run_preview(options: PreviewOptions) -> int:
    """Print the preview; raises UserError at the end if the recipe cannot be trained on as it is."""
    config = load_recipe(TrainConfig, options.recipe, options.overrides)
    out = options.out or Path("previews") / Path(options.recipe).stem
    _check_early(options, config, out)
    record = preview_recipe(options, config, out)
    if options.json:
        print(json.dumps(finite(record), indent=2, allow_nan=False))
    if record["problems"]:
        raise UserError("; ".join(record["problems"]))
    return 0


def preview_recipe(options: PreviewOptions, config: TrainConfig, out: Path) -> dict[str, Any]:
    """Everything that was found, as JSON values; printed part by part without --json."""
    from forkrl.commands.preview_checks import check_data
    from forkrl.commands.preview_sampling import measure_pass_rates, open_sampler, show_prompts
    from forkrl.model.policy import open_tokenizer
    from forkrl.report import preview_text as text
    from forkrl.tasks import open_stream, open_task

    show = (lambda _: None) if options.json else text.show
    tokenizer = open_tokenizer(config.model)
    skips = any(part.skip_bad_rows for part in (config.task, *config.task.parts))
    # Long prompts are counted here rather than rejected, unless training would leave them out.
    task = open_task(config.task, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens if skips else None)
    record: dict[str, Any] = {"recipe": options.recipe, "overrides": list(options.overrides)}
    record |= check_data(config, task, tokenizer, options.mirror)
    show(text.data_report(record))
    prompts = open_stream(task.train, config.task, config.seed).take(min(options.prompts, len(task.train)))
    nothing_to_sample = options.no_samples or not (prompts or options.measures_pass_rates)
    if nothing_to_sample or record["prompt_tokens"]["over"]:
        record["prompts"] = show_prompts(config, prompts, tokenizer, None, 0)
        show(text.prompts_report(record, token_ids=options.token_ids))
        return record
    with open_sampler(config, task) as sampler:
        record["sampling"] = config.rollout.model_dump(include=SAMPLING)
        record["prompts"] = show_prompts(config, prompts, tokenizer, sampler, options.samples)
        show(text.prompts_report(record, token_ids=options.token_ids))
        if options.measures_pass_rates:
            rates = measure_pass_rates(
                out, sampler, options.pass_rate_prompts, options.samples, options.pass_rate_interval
            )
            record["pass_rates"] = rates
            show(text.pass_rates_report(record))
            if rates["kept"]:
                show(text.kept_report(record))
            elif options.keep_pass_rate is not None:
                record["problems"].append(
                    f"--keep-pass-rate {options.keep_pass_rate}: none of the {len(rates['prompts']):,} prompts has "
                    f"such a pass rate; widen the interval, which samples nothing again"
                )
    return record


def _check_early(options: PreviewOptions, config: TrainConfig, out: Path) -> None:
    """Reject what can be rejected before torch is imported."""
    if options.keep_pass_rate is not None and config.task.name != "dataset":
        raise UserError(
            f'--keep-pass-rate {options.keep_pass_rate}: filters a data set, but task.name = "{config.task.name}" '
            f"reads no file that could be filtered; --pass-rate-prompts N measures the pass rates alone"
        )
    if options.mirror is not None:
        if not options.mirror.expanduser().is_dir():
            raise UserError(
                f"--mirror {options.mirror}: there is no such folder (docs/evaluate.md says how to make one)"
            )
        if not any(part.name == "dataset" for part in (config.task, *config.task.parts)):
            raise UserError(
                f'--mirror {options.mirror}: is for data sets; the questions of task.name = "{config.task.name}" are '
                f"generated"
            )
    if options.measures_pass_rates:
        require_usable(out)
    model_location(config.model.path)

"""``forkrl chat``: messages from the terminal or a pipe, responses coloured by entropy, alternatives at their forks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.text import Text
from torch import Tensor

from forkrl.analysis.measure import Written, measure_responses
from forkrl.analysis.token_table import TOP
from forkrl.commands.other_options import ChatOptions
from forkrl.commands.reference import parse_reference
from forkrl.commands.subject import locate_weights
from forkrl.config import RuntimeConfig, TaskConfig, TrainConfig
from forkrl.errors import UserError, first_line, notice
from forkrl.model.policy import Policy, open_policy
from forkrl.model.prompt_tokens import PromptCheck
from forkrl.model.stop_tokens import response_text
from forkrl.model.token_texts import TokenTexts
from forkrl.parallel.workers import Workers, open_workers
from forkrl.report.colors import coloured_response
from forkrl.report.preview_text import show
from forkrl.report.terminal import aligned
from forkrl.rollout.embedded import Prefix, decode, stop_tokens
from forkrl.rollout.held_out import evaluation_sampling
from forkrl.rollout.opening import require_cached_decoding
from forkrl.store.resuming import stored_config
from forkrl.tasks.conversation import Conversation

TOP_ENTROPY = 2.0
"""Entropy of the last colour in nats: the scale must be known before the first token."""
FORK_SHARE, MOST_FORKS = 0.2, 12
_CONTEXT = 24  # characters
HELP = """\
/alternatives   what the model could have written at the forks of its last response
/reset          forget the conversation
/exit           leave, as Ctrl-D does; Ctrl-C stops a response
/help           this list"""


def run_chat(options: ChatOptions) -> int:
    config = _settings(options)
    policy = open_policy(config.model, "auto")
    require_cached_decoding(policy)
    with open_workers(policy, None, RuntimeConfig(workers=1)) as workers:
        chat = Chat(options, config, workers)
        for line in _lines(chat.interactive):
            if line == "/exit":
                break
            try:
                chat.handle(line)
            except UserError as error:
                if not chat.interactive:
                    raise
                notice(str(error))
    return 0


def _settings(options: ChatOptions) -> TrainConfig:
    """The run's recipe with its weights, or the defaults with the model."""
    reference = parse_reference(options.model)
    if reference.run is None:
        config, path, revision = TrainConfig(), options.model, None
    else:
        config = stored_config(reference.run)
        path, revision, _ = locate_weights(reference, config.model)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path, "revision": revision})})


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        try:
            # Bytes: in some locales sys.stdin decodes what is not UTF-8 to characters that no tokenizer takes.
            yield from (line.decode("utf-8").rstrip("\r\n") for line in sys.stdin.buffer)
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: is not UTF-8 text ({first_line(error)}); convert it") from error
        return
    import readline  # noqa: F401 - lets input() edit lines and recall earlier ones

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


class Chat:
    """A conversation with a model, and its last response."""

    def __init__(self, options: ChatOptions, config: TrainConfig, workers: Workers) -> None:
        if sys.stdin is None:
            raise UserError("standard input is closed; forkrl chat reads its messages from there")
        self.interactive = sys.stdin.isatty()
        self._workers = workers
        self._policy = workers.policy
        task = _task(options, config, self._policy)
        self._conversation = Conversation(task, self._policy.tokenizer)
        self._check = PromptCheck(self._policy.tokenizer)
        self._allow_unknown = task.allow_unknown_tokens
        of_run = parse_reference(options.model).run is not None
        self._limit: float = options.max_tokens or (config.rollout.max_response_tokens if of_run else math.inf)
        temperature = config.eval.temperature if options.temperature is None else options.temperature
        self._sampling = evaluation_sampling(config, temperature, self._policy)
        self._generator = torch.Generator(self._policy.device).manual_seed(options.seed)
        self._last: Written | None = None
        if self.interactive:
            notice("/help lists the commands")

    def handle(self, line: str) -> None:
        """Do what a line asks for; raises UserError if that is impossible."""
        if not line.strip():
            return
        if line == "/help":
            show(Text(HELP))
        elif line == "/reset":
            self._conversation.reset()
            self._last = None
        elif line == "/alternatives":
            show(Text("\n".join(self._alternatives())))
        elif line.startswith("/") and line[1:].isalpha():
            raise UserError(f"{line}: no such command; /help lists them")
        else:
            self._respond(line)

    def _respond(self, message: str) -> None:
        prompt_ids = self._check(self._conversation.prompt(message), allow_unknown=self._allow_unknown)
        stream = _Stream(self._policy, stop_tokens(self._policy, self._sampling))
        sampling = replace(self._sampling, max_response_tokens=self._room(len(prompt_ids)))
        finished = stopped = False
        try:
            for _, rollout in decode(
                self._policy, [Prefix(prompt_ids)], sampling, self._generator, on_tokens=stream.add
            ):
                finished = rollout.finished
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stopped = True
        stream.end()
        if not stream.ids:  # stopped while it read the prompt
            return
        if not finished and not stopped:
            limit = "--max-tokens" if len(stream.ids) == self._limit else "the model has no further positions"
            notice(f"cut off after {len(stream.ids):,} tokens ({limit})")
        self._last = Written(prompt_ids, tuple(stream.ids))
        self._conversation.add(message, response_text(self._policy.tokenizer, stream.ids, finished=finished))

    def _room(self, prompt_tokens: int) -> int:
        """The limit of a response, or less if the model has fewer positions left."""
        positions = getattr(self._policy.model.config, "max_position_embeddings", math.inf)
        if prompt_tokens >= positions:
            raise UserError(
                f"the conversation has {prompt_tokens:,} tokens, and the model has {positions:,} positions; /reset "
                "begins a new one"
            )
        return int(min(self._limit, positions - prompt_tokens))

    def _alternatives(self) -> list[str]:
        """The likeliest tokens at the positions of highest entropy of the last response, in their order."""
        if self._last is None:
            raise UserError("/alternatives: there is no response yet")
        ids = self._last.response_ids
        [details] = measure_responses(
            self._workers, [self._last], temperature=self._sampling.temperature or 1.0, top=TOP
        )
        texts = TokenTexts(self._policy.tokenizer)
        count = min(math.ceil(FORK_SHARE * len(ids)), MOST_FORKS)
        rows = [["position", "entropy", "after", "sampled", "alternatives"]]
        for place in sorted(details.entropy.topk(count).indices.tolist()):
            before = "".join(texts[token] for token in ids[max(place - _CONTEXT, 0) : place])[-_CONTEXT:]
            found = zip(details.top_ids[place].tolist(), details.top_probs[place].tolist(), strict=True)
            others = [f"{texts[token]!r} {prob:.1%}" for token, prob in found if token != ids[place]]
            sampled = f"{texts[ids[place]]!r} {math.exp(details.logprobs[place]):.1%}"
            rows.append([str(place + 1), f"{details.entropy[place]:.2f}", f"…{before}", sampled, ", ".join(others)])
        return aligned(rows)


def _task(options: ChatOptions, config: TrainConfig, policy: Policy) -> TaskConfig:
    """The run's task, or that of a model's own prompts; says which prompts are made."""
    is_run, task = parse_reference(options.model).run is not None, config.task
    kind = "prompts as in its training; " if is_run else ""
    if is_run and task.name == "mix":
        kind = "its task mixes several prompt formats, so prompts are not those of its training; "
    if not is_run or task.name == "mix":
        templated = bool(policy.tokenizer.chat_template)
        task = TaskConfig(name="dataset", data="standard input", verifier="none", chat_template=templated)
    if options.system is not None:
        if not task.chat_template:
            raise UserError(
                f"--system: the prompts of {options.model} have no chat template, and so no system message; write it "
                "into the message"
            )
        task = task.model_copy(update={"system_prompt": options.system})
    how = "the chat template, with the turns before"
    if not task.chat_template:
        how = "no chat template, so the model continues each message on its own"
    notice(f"{options.model}: {kind}{how}")
    return task


class _Stream:
    """Shows a response token by token; holds back tokens that end within a character."""

    def __init__(self, policy: Policy, stop_ids: tuple[int, ...]) -> None:
        self.ids: list[int] = []
        self._tokenizer = policy.tokenizer
        self._stop_ids = stop_ids
        self._shown = 0  # characters
        self._held: list[float] = []  # entropies of tokens not shown yet

    def add(self, tokens_S: Tensor, entropy_S: Tensor) -> None:
        self.ids.append(int(tokens_S[0]))
        if self.ids[-1] not in self._stop_ids:
            self._held.append(float(entropy_S[0]))
            self._show(whole=False)

    def end(self) -> None:
        self._show(whole=True)
        show(Text())

    def _show(self, *, whole: bool) -> None:
        written = self.ids[:-1] if self.ids and self.ids[-1] in self._stop_ids else self.ids
        # Single tokens would lose spaces of some tokenizers, and parts of characters.
        text = str(self._tokenizer.decode(written, clean_up_tokenization_spaces=False))
        if self._held and (whole or not text.endswith("\ufffd")):
            show(coloured_response([text[self._shown :]], [max(self._held)], top=TOP_ENTROPY), end="")
            self._shown = len(text)
            self._held.clear()

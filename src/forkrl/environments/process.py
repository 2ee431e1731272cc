"""Environments of the ``verifiers`` package, in a process of their own: what ``tasks/environment.py`` starts.

Importing this module imports ``verifiers``. Messages are JSON: environment code must not be able to make the trainer
unpickle something.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

from forkrl.errors import first_line
from forkrl.parallel.processes import allow_many_files

KEY_VARIABLE = "FORKRL_ENVIRONMENT_KEY"
_HARNESS = "forkrl_chat"


class Refused(Exception):
    """One sentence on why an environment cannot be used."""


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """The chat loop with tools, in this process: the package's own installs a program with uv for it."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers_config = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            tools, dispatch, servers = await connect_mcp({"mcpServers": servers_config}, stack)
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False))
            body: dict[str, Any] = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
            while True:
                answer = await client.post(
                    f"{endpoint}/chat/completions", json=body, headers={"Authorization": f"Bearer {secret}"}
                )
                if answer.status_code != 200:
                    # A limit of turns or tokens ends a rollout, which is scored as it is.
                    ended = trace.stop_condition is not None or "context_length_exceeded" in answer.text
                    return vf.ProgramResult(0 if ended else 1, "", answer.text)
                message = answer.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(0, "", "")
                for call in message["tool_calls"]:
                    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                    if name not in dispatch:
                        content: Any = f"error: no tool {name!r}"
                    elif not isinstance(arguments, dict):
                        content = "error: arguments must be a JSON object"
                    else:
                        content = await call_mcp(servers, dispatch, name, arguments)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})


__all__ = ["ChatHarness"]  # verifiers looks for it here


def open_environment(request: Mapping[str, Any]) -> tuple[vf.Env[Any], dict[int, vf.Task[Any, Any, Any]]]:
    """The environment and its first ``request["count"]`` tasks by index; raises Refused."""
    sys.modules[_HARNESS] = sys.modules[__name__]  # a harness is named by a module
    args = dict(request["args"])
    args["taskset"] = {**args.get("taskset", {}), "id": request["environment"]}
    config_type = vf.env_config_type(request["environment"], args.get("id") or "")
    roles = [name for name, field in config_type.model_fields.items() if isinstance(field.default, vf.AgentConfig)]
    if len(roles) != 1:
        raise Refused(f"it has {len(roles)} agents ({', '.join(roles)}), and only one can be trained yet")
    own = args.get(roles[0], {})
    if ignored := sorted({"harness", "runtime", "sampling", "client", "retries", "max_turns"} & set(own)):
        raise Refused(f"task.environment_args.{roles[0]}.{ignored[0]} is set by ForkRL; remove it")
    forced = {"harness": {"id": _HARNESS}, "runtime": {"type": "subprocess"}, "max_turns": request["max_turns"]}
    args[roles[0]] = {**own, **forced}
    env = vf.load_environment(vf.resolve_env_config(args))
    tasks = {task.data.idx: task for task in itertools.islice(env.taskset, request["count"])}
    for task in tasks.values():
        if task.NEEDS_CONTAINER or task.data.image is not None:
            raise Refused("its tasks need a container, which ForkRL does not start")
        if task.config.judges:
            raise Refused("its tasks are scored by judges, which ask a model on a server")
    return env, tasks


def describe(task: vf.Task[Any, Any, Any]) -> dict[str, Any]:
    """A task for the trainer; ``messages`` is what the model reads first, as far as it is known."""
    system = [{"role": "system", "content": task.data.system_prompt}] if task.data.system_prompt else []
    prompt = task.data.prompt
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else map(message_to_wire, prompt or [])
    return {"index": task.data.idx, "key": task.key, "messages": [*system, *asked]}


def outcome(episode: vf.Episode[Any, Any, Any]) -> dict[str, Any]:
    """The score of a rollout, or why there is none."""
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not episode.ok or len(episode.traces) != 1:
        text = f"{errors[-1].type}: {errors[-1].message}" if errors else f"{len(episode.traces)} agents ran"
        return {"failure": "timeout" if episode.is_timeout else "error", "message": text[:1000]}
    return {"score": episode.traces[0].reward}


async def serve_rollouts(connection: Connection, env: vf.Env[Any], tasks: Mapping[int, Any], url: str) -> None:
    """Run the rollouts that the trainer asks for, all at once, until it ends."""
    context = vf.ModelContext(model="forkrl", client=vf.EvalClientConfig(base_url=url, api_key_var=KEY_VARIABLE))
    running: dict[int, asyncio.Task[None]] = {}

    async def play(number: int, index: int) -> None:
        def name(trace: vf.Trace) -> None:  # its id is in a header of every request
            trace.id = f"{number}-{uuid.uuid4().hex}"

        try:
            result = outcome(await env.run_episode(tasks[index], context, on_trace=name))
        except asyncio.CancelledError:
            result = {"failure": "timeout"}
        except Exception as error:
            result = {"failure": "error", "message": f"{type(error).__name__}: {first_line(error)}"}
        del running[number]
        connection.send_bytes(json.dumps({"done": number, **result}).encode())

    async with env.serving():
        ready, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(connection.fileno(), ready.set)
        while True:
            await ready.wait()
            ready.clear()
            while connection.poll():
                message = json.loads(connection.recv_bytes())
                for number, index in message.get("run", ()):
                    running[number] = asyncio.create_task(play(number, index))
                for number in message.get("cancel", ()):
                    if number in running:
                        running[number].cancel()


def serve() -> None:
    """Open the environment of the first message, list its tasks, then run rollouts if the message has a ``url``."""
    connection = Connection(int(sys.argv[1]))
    allow_many_files()
    with suppress(EOFError, ConnectionError):  # the trainer has ended
        request = json.loads(connection.recv_bytes())
        try:
            env, tasks = open_environment(request)
            described = [describe(task) for task in tasks.values()]
        except Exception as error:
            text = " ".join(str(error).split())[:400]  # a validation error has several lines
            reason = text if isinstance(error, Refused) else f"{type(error).__name__}: {text}"
            connection.send_bytes(json.dumps({"error": reason}).encode())
            return
        connection.send_bytes(json.dumps({"tasks": described}).encode())
        if request["url"]:
            asyncio.run(serve_rollouts(connection, env, tasks, request["url"]))

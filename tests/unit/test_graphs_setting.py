"""``rollout.cuda_graphs`` in an evaluation and a sweep: no folder begun without it is gone on with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forkrl.analysis.temperatures import Setting
from forkrl.commands.decode_temps import _settings
from forkrl.commands.eval_engines import engine_facts, open_sampler
from forkrl.commands.options import EvalOptions
from forkrl.commands.subject import Subject, open_subject
from forkrl.commands.work_folder import open_work_folder
from forkrl.errors import UserError
from tests.smoke.world import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("graphs") / "model"
    make_model(folder)
    return str(folder)


def subject_of(model: str, graphs: str) -> Subject:
    overrides = [f"rollout.cuda_graphs={graphs}", "runtime.device=cpu", "runtime.workers=1", "runtime.threads=1"]
    return open_subject(EvalOptions(model, overrides=overrides))


def evaluation_question(subject: Subject) -> dict[str, Any]:
    with open_sampler(subject, EvalOptions(subject.name), "plain") as sampler:
        return engine_facts(subject, sampler)


def sweep_question(subject: Subject) -> dict[str, Any]:
    session: Any = SimpleNamespace(
        config=subject.config,
        task=SimpleNamespace(name="task", verifiers={}, fingerprint=""),
        prompts=[],
        workers=SimpleNamespace(count=1),
        policy=SimpleNamespace(device=torch.device("cpu")),
    )
    return _settings(subject, session, [Setting(1.0, 1.0)], 1, None)


@pytest.mark.parametrize("question", [evaluation_question, sweep_question])
def test_a_folder_begun_without_graphs_is_refused_with_them(
    question: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forkrl.rollout.opening.require_graphs", lambda policy: None)
    without, graphed = (question(subject_of(model, graphs)) for graphs in ("false", "true"))
    assert "rollout.cuda_graphs" not in without, "folders older than the setting must go on"
    with open_work_folder(tmp_path / "work", without):
        pass
    refused = pytest.raises(UserError, match=r"\(rollout.cuda_graphs = None, now True\)")
    with refused, open_work_folder(tmp_path / "work", graphed):
        pytest.fail("it was opened")

"""The verifiers that a recipe names, and their pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from forkrl.config import RewardConfig
from forkrl.config.secret_values import SecretValues, is_address
from forkrl.errors import UserError
from forkrl.rewards.batch import VERIFY_CODE, setting_of
from forkrl.rewards.pool import VerifierPool
from forkrl.types import TERM, VerifierSpec

_ENDPOINT = "forkrl.rewards.endpoint:verify_at_endpoint"
_RUBRIC = "forkrl.rewards.rubric:judge"


def verifier_spec(verifier: str, options: Mapping[str, Any], **others: Any) -> VerifierSpec:
    """Of an import path or an address; ``others`` are fields of ``VerifierSpec``."""
    if is_address(verifier):
        return VerifierSpec(_ENDPOINT, {**options, "url": verifier}, **others)
    return VerifierSpec(verifier, options, **others)


def term_specs(config: RewardConfig) -> dict[str, VerifierSpec]:
    """The verifiers of ``reward.terms`` by source."""
    return {TERM + term.name: verifier_spec(term.verifier, term.options) for term in config.terms}


def open_verifier(verifiers: Mapping[str, VerifierSpec], config: RewardConfig, *, remedy: str = "") -> VerifierPool:
    """The recipe's pool, with ``${NAME}`` in options replaced from the environment."""
    secrets = SecretValues()
    prepared = {source: _resolve_options(source, spec, secrets) for source, spec in verifiers.items()}
    try:
        for source, spec in prepared.items():
            if spec.path in (_ENDPOINT, _RUBRIC):
                from forkrl.rewards.endpoint import prepare_endpoint  # imported here: it loads an HTTP client

                timeout_s = config.timeout_s if spec.timeout_s is None else spec.timeout_s
                setting, options = setting_of(source), setting_of(source, options=True)
                prepared[source] = prepare_endpoint(spec, timeout_s, setting, options)
    except UserError as error:
        raise UserError(secrets.hide(str(error))) from None
    return VerifierPool(
        prepared,
        workers=config.workers,
        timeout_s=config.timeout_s,
        memory_mb=config.memory_mb,
        hide=secrets.hide,
        remedy=remedy,
    )


def _resolve_options(source: str, spec: VerifierSpec, secrets: SecretValues) -> VerifierSpec:
    table = "sandbox" if spec.path == VERIFY_CODE else setting_of(source, options=True)
    resolved = {}
    for name, value in spec.options.items():
        key = setting_of(source) if spec.path == _ENDPOINT and name == "url" else f"{table}.{name}"
        resolved[name] = secrets.resolve(key, value)
    return replace(spec, options=resolved)

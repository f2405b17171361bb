"""A policy as a file of its own, without the backbone that it prunes: safetensors with metadata."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from prunevit.agents.policies.policy import Policy
from prunevit.agents.policies.serialization import (
    SavedModelError,
    check_policy_rebuilds,
    describe_policy,
    make_policy,
)
from prunevit.agents.saving import load_weights
from prunevit.envs.vit.described import size_problem
from prunevit.envs.vit.staged_vit import StagedViT

FORMAT = 1
DESCRIPTION = "prunevit-policy"  # key of the file's metadata


def write_policy(file: Path, backbone: StagedViT, policy: Policy) -> None:
    """Writes a policy, and where the backbone's stages lie.

    Raises:
        SavedModelError: policies of this class can't be saved, or it was changed in a way that its
            description doesn't have.
    """
    described = describe_policy(policy)
    weights = {}
    if isinstance(policy, nn.Module):
        check_policy_rebuilds(policy, make_policy(described, backbone), backbone)
        weights = {
            key: tensor.detach().cpu().contiguous().clone()
            for key, tensor in policy.state_dict().items()
        }
    description = {
        "format": FORMAT,
        "backbone": _name_of(backbone.model),
        "width": backbone.width,
        "grid": list(backbone.grid_size),
        "prune_before": list(backbone.prune_before),
        "prune_at": backbone.prune_at,
        "on_prune": backbone.on_prune,
        "policy": described,
    }
    file.write_bytes(save(weights, {DESCRIPTION: json.dumps(description, sort_keys=True)}))


def read_policy(file: Path, vit: nn.Module) -> tuple[StagedViT, Policy]:
    """Reads a policy for ``vit``, which is used as it is.

    On images of another size than those of the training the policy has no calibration.

    Returns:
        ``vit`` with the policy's stages, and the policy.

    Raises:
        SavedModelError: the file is missing, damaged, of another version, or its policy is one for
            another backbone.
    """
    described = describe_policy_file(file)
    made_for = described.get("backbone"), described.get("width")
    found = _name_of(vit), getattr(vit, "embed_dim", None)
    if made_for != found:
        raise SavedModelError(
            f"{file} holds a policy for {made_for[0]} of width {made_for[1]}, the backbone is "
            f"{found[0]} of width {found[1]}"
        )
    try:
        backbone = StagedViT(
            vit,
            described["prune_before"],
            prune_at=described["prune_at"],
            on_prune=described["on_prune"],
        )
        make = partial(make_policy, described["policy"], backbone)
        problem = size_problem(make, file)
        if problem is not None:
            raise SavedModelError(problem)
        policy: Any = make()
        is_of_this_size = described["grid"] == list(backbone.grid_size)
    except (KeyError, TypeError) as error:
        raise SavedModelError(f"the description in {file} is damaged: {error!r}") from error
    if isinstance(policy, nn.Module):
        load_weights(policy, file)
    if not is_of_this_size and hasattr(policy, "calibration"):
        policy.calibration = None
    return backbone, policy


def read_backbone_name(file: Path) -> str:
    """The name of the backbone that the policy in ``file`` was trained for.

    Raises:
        SavedModelError: the file is missing, damaged or of another version.
    """
    return str(describe_policy_file(file).get("backbone"))


def describe_policy_file(file: Path) -> dict[str, Any]:
    """What ``write_policy`` stored of a policy beside its weights.

    Raises:
        SavedModelError: the file is missing, damaged or of another version.
    """
    if not file.is_file():
        raise SavedModelError(f"no file {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            described = json.loads((opened.metadata() or {})[DESCRIPTION])
        if not isinstance(described, dict):
            raise ValueError("its description is no JSON object")
    # JSON that is nested too deeply is a RecursionError
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise SavedModelError(f"{file} holds no policy, or is damaged: {error!r}") from error
    if described.get("format") != FORMAT:
        raise SavedModelError(
            f"{file} was written in format {described.get('format')!r}, this version reads {FORMAT}"
        )
    return described


def _name_of(vit: Any) -> str | None:
    """timm's name of a model; None if timm's factory didn't make it."""
    return (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")

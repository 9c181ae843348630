"""Adapters and plans on the Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from ..patching.checkpoint import upload
from ..plan import ExtensionPlan
from .directory import CONFIG_FILE, FILES, AdapterDirectory

logger = logging.getLogger(__name__)


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload an adapter, or a plan alone, with its card.

    The files that [`save_adapter`], [`ExtensionPlan.save`] and [`~hf_posext.reporting.write_model_card`] write are
    uploaded in one commit, and no others. An adapter is read first, as it is when it is opened.

    Args:
        directory (`str` or `Path`): that holds them.
        repo_id (`str`): `user/name`; the repository is made if it does not exist.
        private (`bool`, *optional*): whether a new repository is private; by default as the organisation has it.
        revision (`str`, *optional*): branch to commit to.
        commit_message (`str`, *optional*): by default it names the plan.
        token (`str` or `bool`, *optional*): by default the one of `hf auth login`.

    Returns:
        `str`: URL of the commit.

    Raises:
        CheckpointError: an adapter that is incomplete or corrupt.
        PlanError: the directory holds no plan, or a corrupt one.
    """
    path = Path(directory)
    if (path / CONFIG_FILE).exists():
        adapter = AdapterDirectory.read(path)
        plan = adapter.plan
        if adapter.base_name is None or Path(adapter.base_name).is_absolute():
            logger.warning(
                "%s names %s as its base model, which others do not have; they will have to give it: "
                "load_adapter(%r, base=model)",
                path,
                adapter.base_name,
                repo_id,
            )
    else:
        plan = ExtensionPlan.load(path)
    return upload(
        path,
        repo_id,
        plan,
        files=FILES,
        private=private,
        revision=revision,
        commit_message=commit_message,
        token=token,
    )

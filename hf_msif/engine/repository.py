"""Repositories of the Hugging Face Hub: files sent there, where that is asked for, and fetched again."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import InputError, first_line

Kind = Literal["dataset", "model"]
CARD = "README.md"
SECONDS = 3.0  # after which a machine without an answer counts as offline
_NAME = r"[A-Za-z0-9][\w.-]*"


def push(folder: Path, names: Sequence[str], repo_id: str, kind: Kind, private: bool, token: str | None) -> str:
    """Sends files to a repository in one commit; makes the repository if there is none.

    Args:
        folder: holds the files.
        names: of the files; the commit replaces those of the same names and leaves others as they are.
        repo_id: `owner/name`.
        kind: of the repository.
        private: only its owners may read the repository.
        token: defaults to that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        InputError: the name is no `owner/name`; the Hub cannot be reached or refuses; or private is asked for, and the
            repository is there already and public.
    """
    from huggingface_hub import HfApi

    if not is_repo_id(repo_id):
        raise InputError(f"repo_id is {repo_id!r}; expected the owner and name of a repository, as 'me/gop-scores'.")
    api = HfApi(token=token)
    try:
        url = str(api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True))
        is_public = not api.repo_info(repo_id, repo_type=kind).private
    except Exception as error:  # of the Hub, of the network, or for want of a token
        raise _unwritten(repo_id, error) from error
    if private and is_public:
        raise InputError(
            f"{repo_id} is there already and public, and private=True was asked for; expected a private repository, "
            "so that no text is published by mistake: pass private=False to publish, or another repo_id."
        )
    try:
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(names),
            repo_type=kind,
            commit_message=f"hf_msif: {', '.join(names)}",
        )
    except Exception as error:
        raise _unwritten(repo_id, error) from error
    return url


def fetched(
    source: str | os.PathLike, names: Sequence[str], kind: Kind, token: str | None = None, revision: str | None = None
) -> Path:
    """The folder with files of a repository, fetched into the cache of the Hub; a folder of this machine is itself.

    Args:
        source: a folder, or `owner/name` of a repository. What exists here is not looked for on the Hub.
        names: of the files.
        kind: of the repository.
        token: defaults to that of `hf auth login`.
        revision: a branch, tag or commit; defaults to the main branch.

    Raises:
        InputError: there is no such repository or file, or the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists() or not is_repo_id(source):
        return path
    from huggingface_hub import HfApi

    api, offline = HfApi(token=token), not is_reachable()  # the cache at once, without retries
    try:
        paths = [
            api.hf_hub_download(str(source), name, repo_type=kind, revision=revision, local_files_only=offline)
            for name in names
        ]
    except Exception as error:
        raise InputError(
            f"{source} is no folder here, and its {' and '.join(names)} cannot be fetched from the Hub as a {kind} "
            f"({first_line(error)}); expected a folder or a repository that holds them: check the name, or pass "
            "token=... for a private one."
        ) from error
    return Path(paths[0]).parent


def is_repo_id(source: str | os.PathLike) -> bool:
    """Whether `source` looks like `owner/name` of a repository.

    >>> is_repo_id("me/gop-scores"), is_repo_id("runs/gop/query"), is_repo_id("../query")
    (True, False, False)
    """
    return isinstance(source, str) and re.fullmatch(f"{_NAME}/{_NAME}", source) is not None


@cache
def is_reachable() -> bool:
    """Whether a connection to the Hub, or to the proxy on the way to it, can be opened."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    target, answers = urlsplit(constants.ENDPOINT), list[bool]()
    proxy = getproxies().get(target.scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)

    def connect() -> None:
        try:
            socket.create_connection((target.hostname or "", port), timeout=SECONDS).close()
            answers.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # the search for an address has no time limit of its own
    thread.start()
    thread.join(SECONDS)
    return bool(answers)


def _unwritten(repo_id: str, error: Exception) -> InputError:
    return InputError(
        f"{repo_id} cannot be written on the Hub ({first_line(error)}); expected a repository that you may write to: "
        "run hf auth login or pass token=..., and check the name."
    )

"""This machine, where jobs are submitted from: what is sent, who answers at the address, the token.

What Ray would send is found by Ray's own rules (.gitignore, .rayignore and its defaults), without
starting it. Facts never hold the token itself. `before_submission` is for `ray job submit` itself:

    export RAY_JOB_SUBMIT_HOOK=tmu_dist.doctor.here.before_submission
"""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tmu_dist.doctor.findings import Finding

_TIMEOUT_SECONDS = 5.0
_LIMIT_BYTES = 100 * 2**20
"""Of a request to Ray's dashboard, through which jobs are submitted. The 512 MiB that Ray's own
messages name hold for `ray.init` inside the cluster only."""
_WARN_FROM = 0.1
"""Of the limit: it is sent and unpacked anew after every change of a file."""
_SHARE_OF_ONE = 0.8
"""A file or folder that holds this much of a folder is named in its place."""
_NAMED, _WORTH_NAMING = 3, 0.05
"""So many things are named, if they are this share of everything."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PROJECT = "tmu_dist/train.py"
_SET_MODE = "export RAY_AUTH_MODE=token, here and wherever `ray` commands are given."
_CLOSE = "Stop it, and start Ray with RAY_AUTH_MODE=token on every node (cluster/node_env.sh)."
_REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back from the address for /api/version."""

    status: int | None = None
    """None: no answer at all."""
    ray_version: str | None = None
    """None: what answers is not Ray, or does not say."""
    error: str = ""
    """Why there is no answer."""


@dataclass(frozen=True, kw_only=True)
class HereFacts:
    """What was seen on this machine; `judge_here` says what it means."""

    directory: str
    sent: Mapping[str, int]
    """Bytes of every file that would be sent, by its path in the directory; folders that are sent
    although they are empty end with a slash."""
    unreadable: str
    """Why the directory could not be read; else nothing."""
    ray_version: str
    auth_mode: str
    """RAY_AUTH_MODE; nothing if it is not set."""
    token_from: str
    """The variable or the file that holds the token; nothing if there is none."""
    token_mode: int | None
    """Permissions of that file."""
    address: str | None
    """Of the cluster's dashboard; None: none was given, so nobody was asked."""
    without_token: Answer | None
    with_token: Answer | None
    """None: there is no token to show."""


def look_here(directory: Path, address: str | None) -> HereFacts:
    """Look at what `ray job submit --working-dir DIRECTORY --address ADDRESS` would meet.

    Imports Ray, but does not start it.

    Args:
        directory: the working directory of the job.
        address: http(s)://HOST:PORT of the cluster's dashboard, if one is known.
    """
    unreadable, sent = "", {}
    try:
        sent = sent_files(directory)
    except OSError as error:
        unreadable = str(error)
    token_from, token_mode, token = _find_token()
    return HereFacts(
        directory=str(directory.absolute()),
        sent=sent,
        unreadable=unreadable,
        ray_version=version("ray"),
        auth_mode=os.environ.get("RAY_AUTH_MODE", ""),
        token_from=token_from,
        token_mode=token_mode,
        address=address,
        without_token=ask(address, None) if address else None,
        with_token=ask(address, token) if address and token else None,
    )


def before_submission(*, working_dir: str | None = None, **others: object) -> None:
    """Check what `ray job submit` is about to send; Ray calls this with the command's options.

    Raises:
        SystemExit: it is too much, or cannot be read; nothing is sent.
    """
    if working_dir is None or "://" in working_dir:
        return
    finding = _judge_directory(look_here(Path(working_dir), None))
    if finding.status in ("warning", "fault"):
        told = f"{finding.status}: {finding.found}\n-> {finding.advice}"
        if finding.status == "fault":
            raise SystemExit(told)
        sys.stderr.write(f"{told}\n")


def sent_files(directory: Path) -> dict[str, int]:
    """Bytes of each file that Ray would pack, as in `HereFacts.sent`, by the rules of Ray itself.

    Raises:
        OSError: something cannot be read, which ends `ray job submit`, too.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    root = directory.absolute()
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder")
    found = {}

    def note(path: Path) -> None:
        name = path.relative_to(root).as_posix()
        if path.is_file():
            found[name] = path.stat().st_size
        elif path.is_dir() and next(path.iterdir(), None) is None:
            found[f"{name}/"] = 0

    packaging._dir_travel(
        root,
        [packaging._get_excludes(root, get_runtime_env_default_excludes())],
        note,
        include_gitignore=os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1",
        logger=logging.Logger("packaging", level=logging.CRITICAL),
    )
    return found


def packed_bytes(sent: Mapping[str, int]) -> int:
    """Size of the package that Ray makes of these files: a zip file, which it does not compress."""
    headers = sum(30 + 46 + 2 * len(name.encode()) for name in sent)
    return headers + sum(sent.values()) + 22


def heaviest(sent: Mapping[str, int]) -> list[tuple[str, int]]:
    """The few files and folders worth naming, with their bytes, the heaviest first.

    Of a folder that is heavy because of one thing in it, that thing is named.
    """
    weights: Counter[str] = Counter()
    inside: dict[str, set[str]] = {}
    for name, size in sent.items():
        path = PurePosixPath(name)
        for below, above in zip((path, *path.parents), path.parents):
            inside.setdefault(str(above), set()).add(str(below))
        weights.update(dict.fromkeys(map(str, (path, *path.parents)), size))

    def narrowed(name: str) -> str:
        within = max(inside.get(name, ()), key=weights.__getitem__, default=None)
        if within is None or weights[within] < _SHARE_OF_ONE * weights[name]:
            return name
        return narrowed(within)

    named = sorted(map(narrowed, inside.get(".", ())), key=weights.__getitem__, reverse=True)
    return [(n, weights[n]) for n in named[:_NAMED] if weights[n] > _WORTH_NAMING * weights["."]]


def ask(address: str, token: str | None, timeout_seconds: float = _TIMEOUT_SECONDS) -> Answer:
    """Ask a dashboard for its version, showing a token or none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        request = Request(f"{address.rstrip('/')}/api/version", headers=headers)
        with urlopen(request, timeout=timeout_seconds) as reply:
            return Answer(status=reply.status, ray_version=_version_in(reply.read(2**16)))
    except HTTPError as refusal:
        return Answer(status=refusal.code)
    except (OSError, HTTPException, ValueError) as error:
        return Answer(error=str(getattr(error, "reason", error)) or type(error).__name__)


def _version_in(content: bytes) -> str | None:
    try:
        return str(json.loads(content)["ray_version"])
    except (ValueError, KeyError, TypeError):
        return None


def _find_token() -> tuple[str, int | None, str]:
    """The token where Ray looks for it: what holds it, that file's permissions, and itself."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return "RAY_AUTH_TOKEN", None, token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        token = file.read_text().strip()
        return (str(file), stat.S_IMODE(file.stat().st_mode), token) if token else ("", None, "")
    except (OSError, UnicodeDecodeError):
        return "", None, ""


def judge_here(facts: HereFacts) -> list[Finding]:
    """What the facts mean: at least one finding of each of the three checks."""
    return [_judge_directory(facts), _judge_address(facts), *_judge_token(facts)]


def _judge_directory(facts: HereFacts) -> Finding:
    finding = partial(Finding, check="working directory")
    if facts.unreadable:
        return finding(
            status="fault",
            found=f"{facts.directory} cannot be packed: {facts.unreadable}.",
            advice="Make it readable, or name it in .rayignore.",
        )
    size = packed_bytes(facts.sent)
    finding = partial(
        finding,
        numbers={
            "files": float(len(facts.sent)),
            "unpacked_bytes": float(sum(facts.sent.values())),
            "packed_bytes": float(size),
            "limit_bytes": float(_LIMIT_BYTES),
        },
    )
    found = f"{facts.directory}: {len(facts.sent):,} files, {_mebibytes(size)} would be sent"
    if size >= _WARN_FROM * _LIMIT_BYTES:
        heavy = heaviest(facts.sent)
        named = "".join(f", {name} {_mebibytes(part)}" for name, part in heavy)
        return finding(
            status="fault" if size > _LIMIT_BYTES else "warning",
            found=f"{found}, of {_mebibytes(_LIMIT_BYTES)} that the dashboard takes{named}.",
            advice="Write what jobs do not need into .rayignore"
            + "".join(f", /{name}" for name, _ in heavy)
            + ", a line each. Data belongs in a store or on a disk of the cluster.",
        )
    if _PROJECT not in facts.sent:
        return finding(
            status="warning",
            found=f"{found}, without {_PROJECT}: jobs run the code that is installed there.",
            advice="Submit from the root of the repository, where tmu_dist/ lies.",
        )
    return finding(status="ok", found=f"{found}.")


def _judge_address(facts: HereFacts) -> Finding:
    finding = partial(Finding, check="address")
    answer = facts.with_token or facts.without_token
    if facts.address is None or answer is None:
        return finding(
            status="skipped",
            found="RAY_API_SERVER_ADDRESS and RAY_ADDRESS name no dashboard (http://...).",
        )
    tunnel = "`ray dashboard cluster/FILE.yaml` or `kubectl port-forward`"
    if answer.status is None:
        return finding(
            status="fault",
            found=f"Nobody answers at {facts.address}: {answer.error}.",
            advice=f"Leave {tunnel} running in another terminal, and check host and port.",
        )
    if answer.status in _REFUSALS:
        return finding(status="ok", found=f"{facts.address} answers those with its token.")
    if answer.ray_version is None:
        return finding(
            status="fault",
            found=f"{facts.address} answers, but not as Ray does (status {answer.status}).",
            advice=f"Give host and port of the dashboard, 127.0.0.1:8265 with {tunnel}.",
        )
    if answer.ray_version != facts.ray_version:
        return finding(
            status="warning",
            found=f"Ray is {answer.ray_version} on the cluster and {facts.ray_version} here.",
            advice="Install what constraints.txt says, here or (`ray up` again) on the cluster.",
        )
    found = f"Ray {answer.ray_version} answers at {facts.address}."
    url = urlsplit(facts.address)
    if url.scheme == "http" and url.hostname not in _LOOPBACK:
        return finding(
            status="warning",
            found=f"{found} Token and code go there unencrypted.",
            advice=f"Let the dashboard listen on 127.0.0.1 only, and reach it with {tunnel}.",
        )
    return finding(status="ok", found=found)


def _judge_token(facts: HereFacts) -> list[Finding]:
    finding = partial(Finding, check="token")
    if faults := list(_token_faults(facts)):
        return [finding(status="fault", found=found, advice=advice) for found, advice in faults]
    if facts.with_token is None or facts.with_token.ray_version is None:
        known = f"The token of {facts.token_from} was shown to no cluster."
        return [finding(status="skipped", found=known)]
    known = f"The cluster wants a token, and takes that of {facts.token_from}."
    return [finding(status="ok", found=known)]


def _token_faults(facts: HereFacts) -> Iterator[tuple[str, str]]:
    """What is wrong, and what to do about it."""
    fetch = "Copy ~/.ray/auth_token from the machine that started the cluster"
    if facts.auth_mode.lower() != "token":
        mode = facts.auth_mode or "not set"
        yield f"RAY_AUTH_MODE is {mode} here: `ray job` shows no token.", _SET_MODE
    if not facts.token_from:
        make = "for a new one: (umask 077; ray get-auth-token --generate)"
        yield "There is no token: neither RAY_AUTH_TOKEN nor ~/.ray/auth_token.", f"{fetch}; {make}"
    if facts.token_mode is not None and facts.token_mode & 0o077:
        danger = "and with it run code on the cluster"
        yield f"Others may read {facts.token_from}, {danger}.", f"chmod 600 {facts.token_from}"
    if facts.without_token is not None and facts.without_token.ray_version is not None:
        danger = "whoever reaches it can run code there"
        yield f"{facts.address} wants no token: {danger}.", _CLOSE
    if facts.with_token is not None and facts.with_token.status in _REFUSALS:
        yield f"{facts.address} does not take the token of {facts.token_from}.", f"{fetch}."


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"

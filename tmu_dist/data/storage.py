"""Objects of a store, by URL: local folders, s3://, gs://, az://, http(s):// and memory://.

The one place that talks to storage. Every function takes the URL of a folder and a path inside
it; every failure is a `StorageError` with the full URL of the object. Transient failures (5xx,
dropped connections, timeouts) are retried with back-off for a bounded time. Credentials, region
and endpoint come from the environment, as obstore reads them (AWS_ENDPOINT_URL,
AWS_SKIP_SIGNATURE, ...); plain http is used only where the URL or the endpoint says http://.

Not here: caching, archives, checksums.

A process that has used these functions must not be forked: obstore's runtime threads do not survive
a fork and the child hangs. Start workers with "forkserver" or "spawn".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

REMOTE_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")

# Each pause is drawn from [first, base * last pause], so base 2 would hardly grow. These settings
# ride out about ten seconds of a store that refuses or fails, then say so.
_RETRY: RetryConfig = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=5),
        "base": 3,
    },
}


class StorageError(ValueError):
    """An object or store that cannot be reached, read or written."""


class MissingObjectError(StorageError):
    """An object that does not exist."""


def local_path(url: str) -> Path | None:
    """Return the folder that a plain path or file:// URL means; None for any other URL."""
    if "://" not in url:
        return Path(url).expanduser().absolute()
    if url.startswith("file://"):
        return Path(unquote(urlsplit(url).path))
    return None


def is_process_local(url: str) -> bool:
    """Say whether other processes see something else under this URL (true for memory://)."""
    return url.startswith("memory://")


def join_url(url: str, path: str) -> str:
    """Return the full URL of a path inside a folder, as error messages name it."""
    return f"{url.rstrip('/')}/{path}"


def open_store(url: str, *, create: bool = False) -> ObjectStore:
    """Open the folder at a URL.

    Args:
        url: a local path, or a URL; memory://NAME is one folder per name and process.
        create: make a local folder that does not exist yet (elsewhere folders need no making).

    Raises:
        StorageError: unknown scheme, a local folder that does not exist, or bad settings.
    """
    folder = local_path(url)
    if folder is not None:
        if not create and not folder.is_dir():
            raise MissingObjectError(f"There is no folder {folder}.")
        with _named_errors("open", str(folder)):
            return LocalStore(folder, mkdir=create)
    if is_process_local(url):
        return _memory_store(url.rstrip("/"))
    scheme = urlsplit(url).scheme
    if scheme not in REMOTE_SCHEMES:
        raise StorageError(
            f"Cannot open {url}: the scheme must be one of {', '.join(REMOTE_SCHEMES)}, file or "
            "memory, or give a local path."
        )
    plain_http = url.startswith("http://") or (
        scheme.startswith("s3") and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    )
    with _named_errors("open", url):
        return _remote_store(url, plain_http)


def read_bytes(url: str, path: str) -> bytes:
    """Return the whole object."""
    with _named_errors("read", join_url(url, path)):
        return bytes(obstore.get(open_store(url), path).bytes())


def read_text(url: str, path: str) -> str:
    """Return the whole object as UTF-8 text."""
    with _named_errors("read", join_url(url, path)):
        return read_bytes(url, path).decode()


def read_ranges(url: str, path: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Return several byte ranges of one object, near ones in one request.

    Know that the object is long enough (`object_size`) before asking: obstore 0.12 panics in Rust,
    past every `except`, when one of several near ranges starts after the end.
    """
    with _named_errors("read", join_url(url, path)):
        ranges = obstore.get_ranges(open_store(url), path, starts=offsets, lengths=sizes)
        return [bytes(data) for data in ranges]


def write_bytes(url: str, path: str, data: bytes | memoryview) -> None:
    """Write or replace an object. Readers see the old object or the whole new one."""
    with _named_errors("write", join_url(url, path)):
        obstore.put(open_store(url, create=True), path, data)


def delete(url: str, path: str) -> None:
    """Delete one object."""
    delete_many(url, [path])


def delete_many(url: str, paths: Sequence[str]) -> None:
    """Delete objects, many in one request where the store can; local folders left empty go, too.

    Some may be gone already where it fails: the order is not defined.
    """
    if not paths:
        return
    what = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    folder = local_path(url)
    with _named_errors("delete", join_url(url, what)):
        store = open_store(url) if folder is None else LocalStore(folder, automatic_cleanup=True)
        obstore.delete(store, list(paths))


def unfinished_files(url: str) -> list[str]:
    """Return the paths of files that a killed process had not finished writing; local folders only.

    obstore writes NAME#1 and renames it to NAME. No list of objects shows such a file.
    """
    folder = local_path(url)
    if folder is None:
        return []
    found = (path for path in folder.rglob("*#*") if re.search(r"#\d+$", path.name))
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def delete_unfinished(url: str, paths: Sequence[str]) -> None:
    """Delete some of the `unfinished_files`, and folders left empty."""
    folder = local_path(url)
    if folder is None:
        return
    for path in paths:
        with _named_errors("delete", join_url(url, path)):
            file = folder / path
            file.unlink(missing_ok=True)
            for parent in file.relative_to(folder).parents[:-1]:
                with suppress(OSError):  # not empty
                    (folder / parent).rmdir()


def object_size(url: str, path: str) -> int:
    """Return the length of an object in bytes."""
    with _named_errors("look up", join_url(url, path)):
        return obstore.head(open_store(url), path)["size"]


def exists(url: str, path: str) -> bool:
    """Say whether the object exists; an unreachable store is an error, not a no."""
    try:
        object_size(url, path)
    except MissingObjectError:
        return False
    return True


def list_objects(url: str, prefix: str = "") -> dict[str, int]:
    """Return path and length in bytes of all objects below the URL, sorted by path.

    Args:
        url: the folder; one that does not exist has no objects.
        prefix: a folder in it, to list only what lies below.
    """
    try:
        store = open_store(url)
    except MissingObjectError:
        return {}
    with _named_errors("list", join_url(url, prefix)):
        found = obstore.list(store, prefix=prefix or None)
        return dict(sorted((entry["path"], entry["size"]) for part in found for entry in part))


def list_paths(url: str, prefix: str = "") -> list[str]:
    """Return the paths of `list_objects`, sorted."""
    return list(list_objects(url, prefix))


@lru_cache(maxsize=64)
def _remote_store(url: str, plain_http: bool) -> ObjectStore:
    # Kept open: a store holds the connection pool.
    options: ClientConfig = {"connect_timeout": "5s", "timeout": "120s"}
    if plain_http:
        options["allow_http"] = True
    return from_url(url, client_options=options, retry_config=_RETRY)


@cache
def _memory_store(url: str) -> MemoryStore:
    return MemoryStore()


@contextmanager
def _named_errors(action: str, full_url: str) -> Iterator[None]:
    """Turn what obstore raises into a StorageError that names the object."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise MissingObjectError(f"{full_url} does not exist.") from error
    except (BaseError, OSError, ValueError) as error:
        # obstore appends a dump of the Rust error, and servers' answers have pages of HTML.
        reason = str(error).partition("\n")[0]
        raise StorageError(f"Could not {action} {full_url}: {reason}") from error

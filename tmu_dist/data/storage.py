"""Objects of a store, by URL: local folders, s3://, gs://, az://, http(s):// and memory://.

The one place that talks to storage. Every function takes the URL of a folder and a path inside
it; every failure is a `StorageError` with the full URL of the object, what happened and what to
change. Credentials, region, endpoint and proxy come from the environment: what obstore reads by
itself, and profiles of the AWS command line through boto3 (object_store.py). Plain http is used
only where the URL or the endpoint says http://.

A store that fails (5xx, too many requests, refused, reset or silent connections, answers that break
off) is asked again for about `PATIENCE_SECONDS`, with pauses that are drawn at random so that many
processes do not come back at the same moment. What cannot become better (access denied, no such
bucket) is reported at once.

Any number of threads may call these functions at once; they share one store, and so one pool of
connections, per URL and endpoint. Credentials are looked up when the store is first used; later
changes of the environment are not seen, except another endpoint.

Not here: caching, archives, checksums.

A process that has used these functions must not be forked: obstore's runtime threads do not survive
a fork and the child hangs. Start workers with "forkserver" or "spawn".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotSupportedError
from obstore.store import LocalStore, MemoryStore

from tmu_dist.data.object_store import (
    MissingObjectError,
    Patience,
    StorageError,
    advice,
    open_object_store,
    reason,
)
from tmu_dist.workspace import located

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ObjectStore

T = TypeVar("T")

REMOTE_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")

_STREAM_CHUNK_BYTES = 2**20  # small enough to stay in the processor cache until it is hashed
_MEMORY_STORES: dict[str, MemoryStore] = {}


def local_path(url: str) -> Path | None:
    """Return the folder that a plain path or file:// URL means; None for any other URL."""
    url = located(url)
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
    return f"{located(url).rstrip('/')}/{path}"


def open_store(url: str, *, create: bool = False) -> ObjectStore:
    """Open the folder at a URL.

    Args:
        url: a local path, or a URL; memory://NAME is one folder per name and process.
        create: open it for writing, too; a local folder that does not exist yet is made (elsewhere
            folders need no making).

    Raises:
        StorageError: unknown scheme, a local folder that does not exist, or bad settings.
    """
    url = located(url)
    folder = local_path(url)
    if folder is not None:
        if not create and not folder.is_dir():
            raise MissingObjectError(f"There is no folder {folder}.")
        with _named_errors("open", str(folder)):
            return LocalStore(folder, mkdir=create)
    if is_process_local(url):
        return _MEMORY_STORES.setdefault(url.rstrip("/"), MemoryStore())
    scheme = url.partition("://")[0]
    if scheme not in REMOTE_SCHEMES:
        raise StorageError(
            f"Cannot open {url}: the scheme must be one of {', '.join(REMOTE_SCHEMES)}, file or "
            "memory, or give a local path."
        )
    with _named_errors("open", url):
        return open_object_store(url, writing=create)


def read_bytes(url: str, path: str) -> bytes:
    """Return the whole object."""
    return _ask(
        "read", join_url(url, path), lambda: bytes(obstore.get(open_store(url), path).bytes())
    )


def read_text(url: str, path: str) -> str:
    """Return the whole object as UTF-8 text."""
    with _named_errors("read", join_url(url, path)):
        return read_bytes(url, path).decode()


def stream_bytes(url: str, path: str) -> Iterator[memoryview]:
    """Yield a whole object in chunks of about 1 MB.

    A transfer that breaks off is continued where it was, as long as some of it comes again within
    the usual time.

    Raises:
        StorageError: also where the object was replaced meanwhile, or ended too early.
    """
    full_url = join_url(url, path)
    with _named_errors("read", full_url):
        store, patience = open_store(url), Patience()
        size, tag, done = None, None, 0
        while size is None or done < size:
            try:
                answer = _get_from(store, path, done)
                if size is None:
                    size, tag = answer.meta["size"], answer.meta["e_tag"]
                elif (size, tag) != (answer.meta["size"], answer.meta["e_tag"]):
                    raise StorageError(f"{full_url} was replaced while it was read. Read it again.")
                position = answer.range[0]
                for chunk in answer.stream(_STREAM_CHUNK_BYTES):
                    new = memoryview(chunk)[max(0, done - position) :]
                    position += len(chunk)
                    if new:
                        done += len(new)
                        yield new
                        patience.renew()
                if done < size:
                    raise StorageError(f"{full_url} ended after {done:,} of {size:,} bytes.")
            except BaseError as error:
                patience.wait(error)


def read_range(url: str, path: str, offset: int, size: int) -> memoryview:
    """Return `size` bytes of an object, which must have them, without a copy of what came."""
    data = memoryview(
        _ask(
            "read",
            join_url(url, path),
            lambda: obstore.get_range(open_store(url), path, start=offset, length=size),
        )
    )
    _check_length(url, path, offset, size, len(data))
    return data


def read_ranges(url: str, path: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Return several byte ranges of one object, which must have them; near ones in one request.

    Know that the object is long enough (`object_size`) before asking: where a range starts after
    its end, obstore 0.12 also prints a crash report.
    """
    ranges = _ask(
        "read",
        join_url(url, path),
        lambda: obstore.get_ranges(open_store(url), path, starts=offsets, lengths=sizes),
    )
    for offset, size, data in zip(offsets, sizes, ranges, strict=True):
        _check_length(url, path, offset, size, len(data))
    return [bytes(data) for data in ranges]


def write_bytes(url: str, path: str, data: bytes | memoryview) -> None:
    """Write or replace an object. Readers see the old object or the whole new one.

    More than 5 MB go in parts, several at once. What a killed process had sent stays in an object
    store, in no list, until a lifecycle rule of the bucket removes unfinished uploads.
    """
    _ask(
        "write",
        join_url(url, path),
        lambda: obstore.put(open_store(url, create=True), path, data),
    )


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

    def request() -> None:
        folder = local_path(url)
        store = open_store(url) if folder is None else LocalStore(folder, automatic_cleanup=True)
        obstore.delete(store, list(paths))

    _ask("delete", join_url(url, what), request)


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
    return _ask("look up", join_url(url, path), lambda: obstore.head(open_store(url), path)["size"])


def changed_at(url: str, path: str) -> float:
    """Return when an object was last written, in seconds since 1970, by the store's clock."""

    def request() -> float:
        return obstore.head(open_store(url), path)["last_modified"].timestamp()

    return _ask("look up", join_url(url, path), request)


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

    def request() -> dict[str, int]:
        found = obstore.list(store, prefix=prefix or None)
        return dict(sorted((entry["path"], entry["size"]) for part in found for entry in part))

    try:
        store = open_store(url)
    except MissingObjectError:
        return {}
    return _ask("list", join_url(url, prefix), request)


def list_paths(url: str, prefix: str = "") -> list[str]:
    """Return the paths of `list_objects`, sorted."""
    return list(list_objects(url, prefix))


def _get_from(store: ObjectStore, path: str, offset: int) -> GetResult:
    """Ask for an object from a byte on; from the start where the server answers no ranges."""
    if offset:
        with suppress(NotSupportedError):
            return obstore.get(store, path, options={"range": {"offset": offset}})
    return obstore.get(store, path)


def _check_length(url: str, path: str, offset: int, size: int, came: int) -> None:
    if came != size:
        raise StorageError(
            f"{join_url(url, path)} ends at byte {offset + came:,}: bytes {offset:,} to "
            f"{offset + size:,} were asked for. It is truncated, or was replaced."
        )


def _ask(action: str, full_url: str, request: Callable[[], T]) -> T:
    """Make a request, again where that may help."""
    with _named_errors(action, full_url):
        patience = Patience()
        while True:
            try:
                return request()
            except BaseError as error:
                patience.wait(error)


@contextmanager
def _named_errors(action: str, full_url: str) -> Iterator[None]:
    """Turn what obstore raises into a StorageError that names the object."""
    try:
        yield
    except StorageError:
        raise
    except BaseException as error:
        # A panic in Rust is no Exception, and its class has no public name.
        panicked = type(error).__name__ == "PanicException"
        if not panicked and not isinstance(error, (BaseError, OSError, ValueError)):
            raise
        message = str(error)
        what_to_do = advice(full_url, message)
        if isinstance(error, FileNotFoundError) and not what_to_do:
            raise MissingObjectError(f"{full_url} does not exist.") from error
        problem = f"Could not {action} {full_url}: {reason(message)}. {what_to_do}"
        raise StorageError(problem.rstrip()) from error

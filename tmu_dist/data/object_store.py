"""Object stores as the environment describes them: endpoint, credentials, patience, and errors.

What obstore does not do by itself: find profiles of the AWS command line, repeat some requests, say
in words what to change. docs/object_stores.md lists the variables.

Not here: what is done with a store (storage.py), local folders.
"""

from __future__ import annotations

import os
import random
import re
import time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.exceptions import BaseError, GenericError
from obstore.store import HTTPStore, from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PATIENCE_SECONDS = 12
"""How long a store that fails is asked again: no try begins later than this after the first."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.025, 2.0

_CONNECT_SECONDS = 4
# The longest silence. While a request is sent the store is silent, too, so writing has the time
# that 12 parts of 5 MB need on a slow line. An answer that keeps coming may take any time.
_READ_SECONDS, _WRITE_SECONDS = 8, 120

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""Variables that name an endpoint, the strongest first."""
_KINDS = {"s3a": "s3", "abfs": "az", "abfss": "az"}
"""Schemes that are other names."""
_PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_S3_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Any of them tells obstore where credentials come from."""

_BROKEN = r"(?<!Generic )HTTP error: (?!builder)"  # plain web servers are the store "Generic HTTP"
_ADVICE = (
    (
        r"/latest/api/token|/computeMetadata/|/metadata/identity/",
        "The environment has no credentials, and this is no cloud machine with credentials of its "
        "own. Set credentials, or {prefix}_SKIP_SIGNATURE=true to read a public bucket.",
    ),
    (r"<Code>(NoSuchBucket|ContainerNotFound)<", "Check the URL and the endpoint."),
    (
        r"redirect without LOCATION|"
        r"<Code>(AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraintException)",
        "Set AWS_REGION to the region of the bucket.",
    ),
    (
        r"status code: 40[13]",
        "Check the credentials and what they may do; to read a public bucket set "
        "{prefix}_SKIP_SIGNATURE=true. Who may not list a bucket is also told this of an object "
        "that does not exist.",
    ),
    (
        r"Account must be specified",
        "Set AZURE_STORAGE_ACCOUNT_NAME, or write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/.",
    ),
    (
        r"InvalidCertificate",
        "Set SSL_CERT_FILE to a PEM file of the authority that signed the server's certificate.",
    ),
    (
        r"status code: 416|range start must not",
        "The object is shorter: it is truncated, or was replaced.",
    ),
    (r"Range request not supported", "Read through a cache: this server only gives whole objects."),
    (r"BadScheme", "Plain http is used only where the URL or an endpoint variable says http://."),
    (r"performing PROPFIND", "Of web servers only those with WebDAV can be listed."),
    (_BROKEN, "Check the URL, the endpoint, the proxy and the network."),
)
"""What is found in a message of obstore, and what to do; the first that fits counts."""


class StorageError(ValueError):
    """An object or store that cannot be reached, read or written."""


class MissingObjectError(StorageError):
    """An object that does not exist."""


def open_object_store(url: str, *, writing: bool) -> ObjectStore:
    """Return the store at a remote URL, the same for all who ask in this process.

    Args:
        url: a folder in a bucket, or on a web server.
        writing: it will get large requests, which take longer than answers may keep silent.

    Raises:
        StorageError: an endpoint without http:// or https://, or no credentials where the
            environment says that there are some.
    """
    for name in _ENDPOINTS.get(_kind(url), ()):
        if endpoint := os.environ.get(name):
            if not endpoint.startswith(("http://", "https://")):
                raise StorageError(
                    f"{name} must begin with http:// or https://, got {endpoint}: {url} cannot be "
                    "opened."
                )
            return _open(url, endpoint, writing)
    return _open(url, None, writing)


class Patience:
    """How long a store is asked again where obstore gives up at once.

    By itself obstore 0.12 repeats a request that fails before its answer begins, and continues the
    body of an object that has an ETag. It does not repeat deletions whose connection is reset or
    silent, pages of a list that break off, bodies without ETag, and what was silent for longer than
    the patience (writing): that gets a second chance, whatever the time.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin again, for something has come."""
        self._end = time.monotonic() + PATIENCE_SECONDS
        self._longest = _FIRST_PAUSE_SECONDS
        self._waited = False

    def wait(self, error: BaseError) -> None:
        """Pause before another try.

        Raises:
            BaseError: this one, where another try would not help or the time is over.
        """
        message = str(error)
        pause = random.uniform(0, self._longest)
        broken = isinstance(error, GenericError) and re.search(_BROKEN, message)
        first = not self._waited and " retries, " not in message
        if not broken or (time.monotonic() + pause > self._end and not first):
            raise error
        self._longest = min(2 * self._longest, _LONGEST_PAUSE_SECONDS)
        self._waited = True
        time.sleep(pause)


def reason(message: str) -> str:
    """Return what matters of obstore's message: its first line, and what server or system said.

    After the first line follow pages of HTML or XML, and a dump of the error in Rust.
    """
    line, _, dump = message.partition("\n")
    line = line.partition(" <")[0]
    line = re.sub(r"^Generic \w+ error: |, max_retries: \d+, retry_timeout: \w+ ", "", line)
    code, said = (re.search(f"<{name}>([^<\n]*)", message) for name in ("Code", "Message"))
    system = re.search(r'(?:message|error): "([^"]+)"|InvalidCertificate\(\s*(\w+)', dump)
    if code and said:
        line += f" {code[1]}, {said[1]}"
    elif system and (words := system[1] or system[2]) not in line:
        line += f" ({words})"
    elif "kind: Timeout" in dump:
        line += " (no answer in time)"
    return line.rstrip(".: ")


def advice(url: str, message: str) -> str:
    """Return what to do about a message of obstore; nothing where it says all."""
    what_to_do = next((words for sign, words in _ADVICE if re.search(sign, message)), "")
    prefix = _PREFIXES.get(_kind(url))
    if "{prefix}" in what_to_do and prefix is None:
        return "Web servers are read without credentials; other stores have URLs of their own."
    return what_to_do.format(prefix=prefix)


def _kind(url: str) -> str:
    scheme = url.partition("://")[0]
    return _KINDS.get(scheme, scheme)


def _retry_config() -> RetryConfig:
    # obstore draws each pause from [first, base * last pause]. They grow slowly: about 30 tries in
    # all. Of requests to a store that refuses 30 % (50 %) of them one in 10^8 (10^5) fails, and the
    # mean one waits 15 ms (50 ms).
    return {
        "max_retries": 1_000,  # the time is the limit
        "retry_timeout": timedelta(seconds=PATIENCE_SECONDS),
        "backoff": {
            "init_backoff": timedelta(seconds=_FIRST_PAUSE_SECONDS),
            "max_backoff": timedelta(seconds=_LONGEST_PAUSE_SECONDS),
            "base": 2.5,
        },
    }


@lru_cache(maxsize=64)
def _open(url: str, endpoint: str | None, writing: bool) -> ObjectStore:
    # Kept open: a store holds the connection pool.
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=_WRITE_SECONDS if writing else _READ_SECONDS),
        "timeout": timedelta(days=1),
        "allow_http": (endpoint or url).startswith("http://"),
    }
    if _kind(url) in ("http", "https"):
        return HTTPStore.from_url(url, client_options=options, retry_config=_retry_config())
    settings: dict[str, Any] = {}
    if _kind(url) == "s3":
        settings["credential_provider"] = _profile_credentials()
        if region := os.environ.get("AWS_REGION"):
            settings["region"] = region  # it goes before the region of a profile
        if endpoint and "AWS_DISABLE_BULK_DELETE" not in os.environ:
            # Not every store that speaks S3 knows this request; one for each object works anywhere.
            settings["disable_bulk_delete"] = True
    return from_url(url, client_options=options, retry_config=_retry_config(), **settings)


def _profile_credentials() -> Any:
    """Return credentials of a profile, renewed as they expire; None where obstore finds its own."""
    if any(os.environ.get(name) for name in _S3_CREDENTIALS):
        return None
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    profile = os.environ.get("AWS_PROFILE")
    if not profile and not file.is_file():
        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            raise StorageError(
                "There are no credentials in the environment. Set AWS_SKIP_SIGNATURE=true for a "
                "public bucket, or credentials."
            )
        return None
    what = f"AWS_PROFILE is {profile}" if profile else f"There is a file of credentials {file}"
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise StorageError(
            f"{what}, which boto3 reads. Install it (pip install boto3), or set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket."
        ) from error
    try:
        return Boto3CredentialProvider()
    except Exception as error:  # botocore has a class of its own for each way to fail
        raise StorageError(
            f"{what}, but boto3 finds no credentials: {error}. Check AWS_PROFILE and the file."
        ) from error

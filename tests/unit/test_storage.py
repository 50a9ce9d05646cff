"""Objects by URL: what is asked again and for how long, what is not, what errors say.

The server of these tests fails in chosen ways; real S3 servers are in test_object_stores.py.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from tests.faulty_server import Fault, FaultyServer, faulty_server
from tmu_dist.data import object_store, storage
from tmu_dist.data.storage import MissingObjectError, StorageError

DATA = random.Random(7).randbytes(3_000_000)
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
ACCOUNT = {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}
LISTED = b"""<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>x/f</Key>
<LastModified>2022-01-01T00:00:00.000Z</LastModified><ETag>"1"</ETag><Size>3</Size></Contents>
</ListBucketResult>"""

READS: dict[str, Callable[[str], bytes]] = {
    "read_bytes": lambda url: storage.read_bytes(url, "f"),
    "stream_bytes": lambda url: b"".join(storage.stream_bytes(url, "f")),
    "read_range": lambda url: bytes(storage.read_range(url, "f", 0, len(DATA))),
    "read_ranges": lambda url: b"".join(storage.read_ranges(url, "f", [0, 9], [9, len(DATA) - 9])),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables, no files of this machine; no stores of other tests."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    object_store._open.cache_clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience."""
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 2)
    monkeypatch.setattr(object_store, "_READ_SECONDS", 0.2)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """Serves DATA."""
    with faulty_server(DATA) as server:
        yield server


def only_first(fault: Fault) -> Callable[[int], Fault]:
    return lambda number: fault if number == 0 else None


def use(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# Asked again


@pytest.mark.parametrize("etag", ['"1"', None], ids=["etag", "no-etag"])
@pytest.mark.parametrize(
    "fault", [503, 500, 429, "reset", "close", "silent", "cut", "cut-reset", "silent-body"]
)
@pytest.mark.usefixtures("quick")
def test_reads_outlast_one_failure(server: FaultyServer, fault: Fault, etag: str | None) -> None:
    server.served.etag = etag
    server.served.fault = only_first(fault)
    for name, read in READS.items():
        server.served.requests.clear()
        assert read(f"{server.url}/x") == DATA, name
        assert len(server.served.requests) > 1, name


@pytest.mark.parametrize("fault", [503, 429, "reset", "close", "silent"])
@pytest.mark.usefixtures("quick")
def test_other_requests_outlast_one_failure(
    server: FaultyServer, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_WRITE_SECONDS", 0.2)
    use(monkeypatch, AWS_ENDPOINT_URL=server.url, **KEYS)
    server.served.fault = only_first(fault)
    url, requests = "s3://bucket/x", server.served.requests
    assert storage.object_size(url, "f") == len(DATA)
    assert [r.method for r in requests] == ["HEAD", "HEAD"]
    requests.clear()
    storage.write_bytes(url, "f", b"abc")
    assert [r.method for r in requests] == ["PUT", "PUT"]
    requests.clear()
    storage.delete(url, "f")
    assert [r.method for r in requests] == ["DELETE", "DELETE"]


def test_a_silent_write_has_a_second_chance(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(object_store, "_WRITE_SECONDS", 0.3)
    server.served.fault = only_first("silent")
    storage.write_bytes(server.url, "f", b"abc")
    assert len(server.served.requests) == 2
    server.served.fault = lambda number: "silent"
    with pytest.raises(StorageError, match="Could not write .*no answer in time"):
        storage.write_bytes(server.url, "f", b"abc")
    assert len(server.served.requests) == 4, "and no third"


@pytest.mark.parametrize("fault", [503, "cut", "cut-reset", "silent-body"])
@pytest.mark.usefixtures("quick")
def test_a_list_that_breaks_off_is_asked_for_again(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_server(LISTED, only_first(fault)) as server:
        use(monkeypatch, AWS_ENDPOINT_URL=server.url, **KEYS)
        assert storage.list_objects("s3://bucket/x") == {"f": 3}
        assert len(server.served.requests) == 2


def test_a_stream_goes_on_where_it_broke_off(server: FaultyServer) -> None:
    server.served.etag = None  # obstore continues by itself where there is one
    server.served.fault = lambda number: "cut" if number < 2 else None
    assert b"".join(storage.stream_bytes(server.url, "f")) == DATA
    ranges = [request.headers.get("range") for request in server.served.requests]
    chunk = storage._STREAM_CHUNK_BYTES
    assert ranges[0] is None and len(ranges) == 3
    starts = [int(str(asked).removeprefix("bytes=").split("-")[0]) for asked in ranges[1:]]
    assert starts[0] >= chunk and starts[1] >= starts[0], "what had come was kept"


def test_a_stream_begins_anew_where_there_are_no_ranges(server: FaultyServer) -> None:
    server.served.etag, server.served.has_ranges = None, False
    server.served.fault = only_first("cut")
    assert b"".join(storage.stream_bytes(server.url, "f")) == DATA
    with pytest.raises(StorageError, match=r"/f: .*[Rr]ange.*Read through a cache"):
        storage.read_range(server.url, "f", 5, 5)


def test_a_stream_never_mixes_two_objects(server: FaultyServer) -> None:
    def replace(number: int) -> Fault:
        if number == 0:
            return "cut"
        server.served.data = DATA[::-1] + b"more"
        return None

    server.served.etag, server.served.fault = None, replace
    with pytest.raises(StorageError, match=r"/f was replaced while it was read"):
        list(storage.stream_bytes(server.url, "f"))


@pytest.mark.usefixtures("quick")
def test_patience_begins_anew_with_what_comes(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(storage, "_STREAM_CHUNK_BYTES", 2**16)
    server.served.etag = None
    server.served.fault = lambda number: "silent-body" if number < 5 else None
    started = time.monotonic()
    assert b"".join(storage.stream_bytes(server.url, "f")) == DATA
    assert time.monotonic() - started > 1


@pytest.mark.usefixtures("quick")
def test_a_stream_without_progress_ends(server: FaultyServer) -> None:
    server.served.data, server.served.etag = DATA[:1000], None
    server.served.fault = lambda number: "cut"
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"Could not read http://.*/f"):
        list(storage.stream_bytes(server.url, "f"))
    assert 0.5 < time.monotonic() - started < 5
    assert len(server.served.requests) > 3


def test_an_empty_object_is_a_stream_of_nothing(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path), "empty", b"")
    assert list(storage.stream_bytes(str(tmp_path), "empty")) == []


def test_many_small_requests_to_a_store_that_refuses_a_third(server: FaultyServer) -> None:
    """The true policy: every byte comes, and the pauses are short."""
    draws = random.Random(3)
    server.served.fault = lambda number: 503 if draws.random() < 0.3 else None
    offsets = [draws.randrange(len(DATA) - 100) for _ in range(400)]
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        parts = threads.map(lambda at: storage.read_range(server.url, "f", at, 100), offsets)
        assert all(part == DATA[at : at + 100] for at, part in zip(offsets, parts, strict=True))
    assert len(server.served.requests) > 500
    assert time.monotonic() - started < 12  # 1.5 s on an idle machine


def test_a_dead_store_is_reported_in_time() -> None:
    """The true policy against stores that refuse, are silent, and do not even connect."""
    errors: dict[str, tuple[str, float]] = {}

    def read(name: str, url: str) -> None:
        started = time.monotonic()
        try:
            storage.read_bytes(url, "f")
        except StorageError as error:
            errors[name] = str(error), time.monotonic() - started

    with ExitStack() as stack:
        silent = stack.enter_context(faulty_server(DATA, lambda number: "silent"))
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # nobody accepts: further connections hang
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        urls = {
            "refused": "http://127.0.0.1:1",
            "silent": silent.url,
            "unreachable": f"http://127.0.0.1:{full.getsockname()[1]}",
        }
        threads = [threading.Thread(target=read, args=place) for place in urls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors.keys() == urls.keys()
    for name, (message, seconds) in errors.items():
        assert f"{urls[name]}/f" in message and "Check the URL, the endpoint" in message
        assert 5 < seconds < 25, f"{name}: {seconds:.1f} s"
    assert "Connection refused" in errors["refused"][0]
    assert "no answer in time" in errors["silent"][0]


def test_threads_share_one_store(server: FaultyServer) -> None:
    def read(seed: int) -> None:
        draws = random.Random(seed)
        for _ in range(30):
            at, size = draws.randrange(len(DATA) - 9999), draws.randrange(1, 9999)
            assert storage.read_range(server.url, "f", at, size) == DATA[at : at + size]

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(read, range(16)))
    assert object_store._open.cache_info().currsize == 1


def test_threads_open_one_memory_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly() -> MemoryStore:
        time.sleep(0.01)
        return MemoryStore()

    monkeypatch.setattr(storage, "MemoryStore", slowly)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: storage.write_bytes("memory://race", str(n), b"x"), range(8)))
    assert len(storage.list_paths("memory://race")) == 8


# Said at once


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (403, b"", r"AWS_SKIP_SIGNATURE=true"),
        (
            403,
            b'<?xml version="1.0"?>\n<Error><Code>InvalidAccessKeyId</Code><Message>No such key.'
            b"</Message></Error>",
            r"InvalidAccessKeyId, No such key\. Check the credentials",
        ),
        (401, b"", r"Check the credentials"),
        (301, b"", r"Set AWS_REGION to the region of the bucket"),
        (
            400,
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>The region 'us-east-1' is "
            b"wrong; expecting 'eu-west-1'</Message></Error>",
            r"expecting 'eu-west-1'\. Set AWS_REGION",
        ),
        (
            404,
            b"<Error><Code>NoSuchBucket</Code><Message>There is no such bucket</Message></Error>",
            r"NoSuchBucket, There is no such bucket\. Check the URL and the endpoint",
        ),
        (400, b"<html>\n<p>pages of it</p>", r"400 Bad Request\.$"),
    ],
)
def test_what_cannot_become_better_is_said_at_once(
    status: int, body: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_server(fault=lambda number: status) as server:
        server.served.error_body = body
        use(monkeypatch, AWS_ENDPOINT_URL=server.url, **KEYS)
        with pytest.raises(StorageError, match=said) as caught:
            storage.read_bytes("s3://bucket/x", "f")
        assert "s3://bucket/x/f" in str(caught.value) and "\n" not in str(caught.value)
        assert not isinstance(caught.value, MissingObjectError)
        assert len(server.served.requests) == 1


def test_web_servers_get_no_advice_about_credentials(server: FaultyServer) -> None:
    server.served.fault = lambda number: 403
    with pytest.raises(StorageError, match=r"403 Forbidden\. Web servers are read without"):
        storage.read_bytes(server.url, "f")
    assert len(server.served.requests) == 1


def test_a_missing_object_is_an_error_of_its_own(server: FaultyServer) -> None:
    server.served.fault = lambda number: 404
    assert not storage.exists(server.url, "f")
    with pytest.raises(MissingObjectError, match=r"/f does not exist\.$"):
        storage.read_bytes(server.url, "f")


def test_a_range_is_never_shorter_than_asked(server: FaultyServer) -> None:
    end = len(DATA)
    with pytest.raises(StorageError, match=rf"ends at byte {end:,}: bytes {end - 4:,} to"):
        storage.read_range(server.url, "f", end - 4, 10)
    with pytest.raises(StorageError, match=rf"ends at byte {end:,}"):
        storage.read_ranges(server.url, "f", [0, end - 4], [4, 10])
    server.served.requests.clear()
    with pytest.raises(StorageError, match="The object is shorter"):
        storage.read_range(server.url, "f", end + 4, 10)
    assert len(server.served.requests) == 1
    with pytest.raises(StorageError, match="range start .* The object is shorter"):
        storage.read_ranges(server.url, "f", [end - 4, end + 4], [4, 10])


def test_a_silent_consumer_does_not_end_a_stream(server: FaultyServer, quick: None) -> None:
    server.served.data = DATA * 5
    chunks = storage.stream_bytes(server.url, "f")
    came = [next(chunks)]
    time.sleep(0.5)  # longer than a store may be silent
    assert b"".join([*came, *chunks]) == DATA * 5
    assert len(server.served.requests) == 1


# The environment


@pytest.mark.parametrize(
    ("url", "variables", "path", "authorization"),
    [
        ("s3://bucket/x", "AWS_ENDPOINT_URL=URL", "/bucket/x/f", "=key/.*/us-east-1/"),
        ("s3a://bucket/x", "AWS_ENDPOINT_URL=URL", "/bucket/x/f", "=key/"),
        ("s3://bucket/x", "AWS_ENDPOINT_URL=URL/", "/bucket/x/f", "=key/"),
        ("s3://bucket/x", "AWS_ENDPOINT=URL", "/bucket/x/f", "=key/"),
        (
            "s3://bucket/x",
            "AWS_ENDPOINT_URL_S3=URL AWS_ENDPOINT_URL=http://127.0.0.1:1",
            "/bucket/x/f",
            "=key/",
        ),
        ("s3://bucket/x", "AWS_ENDPOINT_URL=URL AWS_REGION=eu-1", "/bucket/x/f", "/eu-1/"),
        ("s3://bucket/x", "AWS_ENDPOINT_URL=URL AWS_DEFAULT_REGION=eu-1", "/bucket/x/f", "/eu-1/"),
        (
            "s3://bucket/x",
            "AWS_ENDPOINT_URL=URL AWS_SESSION_TOKEN=t",
            "/bucket/x/f",
            "x-amz-security-token",
        ),
        ("s3://bucket/x", "AWS_ENDPOINT_URL=URL AWS_SKIP_SIGNATURE=true", "/bucket/x/f", None),
        (
            "s3://bucket/x",
            "AWS_ENDPOINT_URL=URL AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true",
            "/x/f",
            "=key/",
        ),
        (
            "gs://bucket/x",
            "GOOGLE_BASE_URL=URL GOOGLE_BEARER_TOKEN=t",
            "/bucket/x%2Ff",
            "^Bearer t$",
        ),
        ("gs://bucket/x", "GOOGLE_BASE_URL=URL GOOGLE_SKIP_SIGNATURE=true", "/bucket/x%2Ff", None),
        ("az://box/x", "AZURE_STORAGE_ENDPOINT=URL", "/box/x/f", "^SharedKey me:"),
        ("az://box/x", "AZURE_ENDPOINT=URL AZURE_SKIP_SIGNATURE=true", "/box/x/f", None),
        (
            "abfs://box@me.dfs.core.windows.net/x",
            "AZURE_ENDPOINT=URL",
            "/box/x/f",
            "^SharedKey me:",
        ),
        ("http://nowhere.example/x", "http_proxy=URL", "http://nowhere.example/x/f", None),
        (
            "s3://bucket/x",
            "AWS_ENDPOINT_URL=http://nowhere.example HTTP_PROXY=URL",
            "http://nowhere.example/bucket/x/f",
            "=key/",
        ),
    ],
)
def test_variables_say_where_and_as_whom(
    server: FaultyServer,
    url: str,
    variables: str,
    path: str,
    authorization: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, **KEYS, **ACCOUNT)
    for variable in variables.split():
        name, _, value = variable.partition("=")
        monkeypatch.setenv(name, re.sub("^URL", server.url, value))
    assert storage.read_bytes(url, "f") == DATA
    (request,) = server.served.requests
    assert request.path == path
    if authorization is None:
        assert "authorization" not in request.headers
    else:
        assert re.search(authorization, request.headers["authorization"])


@pytest.mark.usefixtures("quick")
def test_no_proxy_is_respected(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, http_proxy="http://127.0.0.1:1", no_proxy="127.0.0.1")
    assert storage.read_bytes(server.url, "f") == DATA


def test_another_endpoint_is_another_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server(b"one") as one, faulty_server(b"other") as other:
        use(monkeypatch, AWS_ENDPOINT_URL=one.url, **KEYS)
        assert storage.read_bytes("s3://bucket/x", "f") == b"one"
        use(monkeypatch, AWS_ENDPOINT_URL=other.url)
        assert storage.read_bytes("s3://bucket/x", "f") == b"other"


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: FaultyServer) -> None:
    """A file of credentials as the AWS command line has it."""
    file = tmp_path / ".aws" / "credentials"
    file.parent.mkdir()
    sections = {"default": "standard", "work": "office"}
    file.write_text(
        "".join(
            f"[{name}]\naws_access_key_id={key}\naws_secret_access_key=secret\n"
            for name, key in sections.items()
        )
    )
    (tmp_path / ".aws" / "config").write_text("[profile work]\nregion=eu-north-1\n")
    use(monkeypatch, AWS_ENDPOINT_URL=server.url)


@pytest.mark.usefixtures("profiles")
def test_profiles_are_read_by_boto3(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    for variables, signed in (
        ({}, "=standard/"),
        ({"AWS_PROFILE": "work"}, "=office/.*/eu-north-1/"),
        ({"AWS_REGION": "eu-west-1"}, "=office/.*/eu-west-1/"),
    ):
        use(monkeypatch, **variables)
        object_store._open.cache_clear()
        with ThreadPoolExecutor(4) as threads:  # boto3 is asked from threads of obstore
            read = threads.map(lambda n: storage.read_bytes("s3://bucket/x", "f"), range(4))
            assert all(data == DATA for data in read)
        last = server.served.requests[-1].headers["authorization"]
        assert re.search(signed, last)
    use(monkeypatch, AWS_PROFILE="nobody")
    object_store._open.cache_clear()
    with pytest.raises(StorageError, match=r"AWS_PROFILE is nobody, but .*could not be found"):
        storage.read_bytes("s3://bucket/x", "f")


@pytest.mark.usefixtures("profiles")
def test_keys_of_the_environment_come_before_profiles(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("boto3", "obstore.auth.boto3"):  # they are not needed then
        monkeypatch.setitem(sys.modules, module, None)
    use(monkeypatch, AWS_PROFILE="work", **KEYS)
    assert storage.read_bytes("s3://bucket/x", "f") == DATA
    assert "=key/" in server.served.requests[0].headers["authorization"]


@pytest.mark.usefixtures("profiles")
def test_a_profile_without_boto3_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("boto3", "obstore.auth.boto3"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StorageError, match=r"file of credentials .*pip install boto3"):
        storage.read_bytes("s3://bucket/x", "f")
    use(monkeypatch, AWS_PROFILE="work")
    with pytest.raises(StorageError, match=r"AWS_PROFILE is work, .*pip install boto3"):
        storage.read_bytes("s3://bucket/x", "f")


@pytest.mark.usefixtures("quick")
def test_no_credentials_at_all(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, AWS_ENDPOINT_URL=server.url, AWS_METADATA_ENDPOINT="http://127.0.0.1:1")
    with pytest.raises(StorageError, match="no credentials.*AWS_SKIP_SIGNATURE=true"):
        storage.read_bytes("s3://bucket/x", "f")
    use(monkeypatch, AWS_EC2_METADATA_DISABLED="true")
    object_store._open.cache_clear()
    with pytest.raises(StorageError, match="no credentials.*AWS_SKIP_SIGNATURE=true"):
        storage.read_bytes("s3://bucket/x", "f")
    assert not server.served.requests


def test_an_endpoint_needs_its_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, AWS_ENDPOINT_URL="127.0.0.1:9000", **KEYS)
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL must begin with http:// or https://"):
        storage.read_bytes("s3://bucket/x", "f")


def test_azure_says_that_it_needs_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="Set AZURE_STORAGE_ACCOUNT_NAME"):
        storage.read_bytes("az://box/x", "f")


@pytest.mark.usefixtures("quick")
def test_a_certificate_of_a_private_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2"
    about = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    about += ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run([*command.split(), *about], check=True, capture_output=True)
    with faulty_server(DATA, certificate=(certificate, key)) as server:
        with pytest.raises(StorageError, match=r"UnknownIssuer.*Set SSL_CERT_FILE"):
            storage.read_bytes(server.url, "f")
        use(monkeypatch, SSL_CERT_FILE=certificate)
        object_store._open.cache_clear()
        assert storage.read_bytes(server.url, "f") == DATA

"""What the doctor says of the machine that jobs are submitted from."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest

from tmu_dist.doctor.findings import Finding
from tmu_dist.doctor.here import (
    Answer,
    HereFacts,
    ask,
    before_submission,
    heaviest,
    judge_here,
    look_here,
    packed_bytes,
    sent_files,
)

ROOT = Path(__file__).parents[2]
MIB = 2**20
ALL_WELL = HereFacts(
    directory="/home/me/tmu-dist",
    sent={"tmu_dist/train.py": 10_000, "README.md": 3000},
    unreadable="",
    ray_version="2.60.0",
    auth_mode="token",
    token_from="/home/me/.ray/auth_token",
    token_mode=0o600,
    address="http://127.0.0.1:8265",
    without_token=Answer(status=401),
    with_token=Answer(status=200, ray_version="2.60.0"),
)


def of(check: str, facts: HereFacts) -> Finding:
    """The one finding of a check."""
    (finding,) = (each for each in judge_here(facts) if each.check == check)
    return finding


def write(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))


# Working directory


def test_ray_asks_before_it_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from click.testing import CliRunner
    from ray.dashboard.modules.job import cli

    def submitted() -> str:
        asked: list[str] = []
        monkeypatch.setattr(cli, "_get_sdk_client", lambda *_, **__: asked.append("cluster"))
        words = ["--working-dir", str(tmp_path), "--", "true"]
        outcome = CliRunner().invoke(cli.submit, words)
        return asked[0] if asked else str(outcome.exception or outcome.output)

    monkeypatch.setenv("RAY_JOB_SUBMIT_HOOK", "tmu_dist.doctor.here.before_submission")
    write(tmp_path, {"tmu_dist/train.py": 100})
    assert submitted() == "cluster"
    write(tmp_path, {"frames/all.npy": 0})
    with (tmp_path / "frames/all.npy").open("r+b") as file:
        file.truncate(200 * MIB)
    assert "fault: " in (refused := submitted()) and "/frames/all.npy" in refused
    (tmp_path / ".rayignore").write_text("/frames/all.npy\n")
    assert submitted() == "cluster"
    before_submission(working_dir="s3://bucket/code.zip", entrypoint="true")


def test_the_files_are_those_that_ray_packs(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    write(
        project,
        {
            "tmu_dist/train.py": 700,
            "tmu_dist/ümlaut.py": 0,
            "tmu_dist/__pycache__/train.pyc": 10,
            "runs/a/log.jsonl": 10,
            "deep/notes.tmp": 10,
            "deep/kept.txt": 4000,
            ".git/HEAD": 10,
            "big.bin": 10,
        },
    )
    (project / "empty").mkdir()
    (project / "nowhere").symlink_to("missing")
    (project / ".gitignore").write_text("/runs/\n")
    (project / ".rayignore").write_text("/big.bin\n")
    (project / "deep/.rayignore").write_text("*.tmp\n")
    package = tmp_path / "package.zip"
    create_package(
        str(project),
        package,
        include_gitignore=True,
        excludes=get_runtime_env_default_excludes(),
        logger=logging.Logger("quiet", level=logging.ERROR),
    )
    sent = sent_files(project)
    with ZipFile(package) as packed:
        assert sent == {each.filename: each.file_size for each in packed.infolist()}
    assert {"deep/kept.txt", "empty/", "tmu_dist/ümlaut.py"} < sent.keys()
    assert packed_bytes(sent) == package.stat().st_size


def test_of_this_repository_code_is_sent_and_little_else() -> None:
    sent = sent_files(ROOT)
    assert {"tmu_dist/train.py", "data_prep/__main__.py", "tuning/search.py"} < sent.keys()
    assert {"tuning/spaces/small.yaml", "cluster/node_env.sh", "constraints.txt"} < sent.keys()
    assert not [name for name in sent if name.startswith(("tests/", "docs/", ".", "runs/"))] or {
        name for name in sent if name.startswith(".")
    } <= {".gitignore", ".rayignore"}
    assert sum(sent.values()) < 5 * MIB


def test_keys_stay_here(tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    write(tmp_path, dict.fromkeys(("a/.env", "a/my.pem", "id_ed25519", "a/x.key", "a.py"), 1))
    assert sent_files(tmp_path).keys() - {".rayignore"} == {"a.py"}


def test_big_things_are_named_where_they_lie() -> None:
    sent = {
        "README.md": 1000,
        "data/archive/train/0.tar": 60 * MIB,
        "data/archive/train/1.tar": 50 * MIB,
        "tmu_dist/train.py": 9000,
        "tmu_dist/core.123": 30 * MIB,
    }
    assert heaviest(sent) == [
        ("data/archive/train", 110 * MIB),
        ("tmu_dist/core.123", 30 * MIB),
    ]
    too_big = of("working directory", replace(ALL_WELL, sent=sent))
    assert too_big.status == "fault"
    assert "100.0 MiB" in too_big.found and "data/archive/train 110.0 MiB" in too_big.found
    assert "/data/archive/train, /tmu_dist/core.123" in too_big.advice


@pytest.mark.parametrize(
    ("size", "status"), [(9 * MIB, "ok"), (11 * MIB, "warning"), (99 * MIB, "warning")]
)
def test_much_is_warned_of_before_it_is_too_much(size: int, status: str) -> None:
    sent = {**ALL_WELL.sent, "model.pt": size}
    finding = of("working directory", replace(ALL_WELL, sent=sent))
    assert finding.status == status
    assert finding.numbers["packed_bytes"] > size
    assert ("/model.pt" in finding.advice) == (status != "ok")


def test_without_the_project_other_code_would_run() -> None:
    finding = of("working directory", replace(ALL_WELL, sent={"README.md": 10}))
    assert finding.status == "warning" and "tmu_dist/train.py" in finding.found


def test_a_directory_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    facts = look_here(tmp_path / "gone", None)
    finding = of("working directory", facts)
    assert finding.status == "fault" and "gone" in finding.found


# Address


class _Dashboard(BaseHTTPRequestHandler):
    """Answers /api/version as the server's `answers` say, by the Authorization header."""

    def do_GET(self) -> None:
        answers = self.server.answers  # type: ignore[attr-defined]
        status, content = answers.get(self.headers.get("Authorization"), (403, "Forbidden"))
        self.send_response(status if self.path == "/api/version" else 404)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: object) -> None:
        pass


RAY = (200, '{"version": "4", "ray_version": "2.60.0"}')


@contextmanager
def dashboard(answers: dict[str | None, tuple[int, str]]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Dashboard)
    server.answers = answers  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_answers_are_told_apart() -> None:
    with dashboard({None: (401, "Missing"), "Bearer good": RAY}) as address:
        assert ask(address, None) == Answer(status=401)
        assert ask(f"{address}/", "good") == Answer(status=200, ray_version="2.60.0")
        assert ask(address, "bad") == Answer(status=403)
    refused = ask(address, "good")
    assert refused.status is None and "refused" in refused.error
    for page in ("<html>", "[]", '"ray_version"', "{}"):
        with dashboard({None: (200, page)}) as address:
            assert ask(address, None) == Answer(status=200)
    assert ask("http://[", None).error and ask("ftp:/x", None).error


def test_silence_is_not_waited_for() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        answer = ask(f"http://127.0.0.1:{silent.getsockname()[1]}", None, timeout_seconds=0.1)
    assert answer.status is None and "timed out" in answer.error


def test_what_is_not_http_is_said() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with closing(connection):
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=greet, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        answer = ask(address, None)
    finding = of("address", replace(ALL_WELL, address=address, with_token=answer))
    assert finding.status == "fault" and "SSH" in finding.found


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (Answer(error="Connection refused"), "fault", "Connection refused"),
        (Answer(status=200), "fault", "not as Ray"),
        (Answer(status=502), "fault", "502"),
        (Answer(status=200, ray_version="2.55.1"), "warning", "2.55.1"),
        (Answer(status=403), "ok", "token"),
        (Answer(status=200, ray_version="2.60.0"), "ok", "2.60.0"),
    ],
)
def test_of_the_address(answer: Answer, status: str, words: str) -> None:
    finding = of("address", replace(ALL_WELL, with_token=answer, without_token=answer))
    assert finding.status == status and words in finding.found


@pytest.mark.parametrize(
    ("address", "status"),
    [("http://10.0.0.1:8265", "warning"), ("https://ray.example", "ok")],
)
def test_a_dashboard_in_the_open_is_warned_of(address: str, status: str) -> None:
    assert of("address", replace(ALL_WELL, address=address)).status == status


def test_without_an_address_nobody_is_asked() -> None:
    facts = replace(ALL_WELL, address=None, with_token=None, without_token=None)
    assert of("address", facts).status == of("token", facts).status == "skipped"


# Token


def test_all_well() -> None:
    assert {each.check: each.status for each in judge_here(ALL_WELL)} == {
        "working directory": "ok",
        "address": "ok",
        "token": "ok",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auth_mode": ""}, "not set"),
        ({"auth_mode": "disabled"}, "disabled"),
        ({"token_from": "", "token_mode": None, "with_token": None}, "no token"),
        ({"token_mode": 0o644}, "Others may read"),
        ({"without_token": Answer(status=200, ray_version="2.60.0")}, "wants no token"),
        ({"with_token": Answer(status=403)}, "does not take"),
        ({"with_token": Answer(status=401)}, "does not take"),
    ],
)
def test_of_the_token(change: dict[str, object], words: str) -> None:
    finding = of("token", replace(ALL_WELL, **change))  # type: ignore[arg-type]
    assert finding.status == "fault" and words in finding.found


def test_the_token_is_found_where_ray_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._raylet import AuthenticationTokenLoader

    def both() -> tuple[str, HereFacts]:
        loader = AuthenticationTokenLoader.instance()
        loader.reset_cache()
        ray_s = loader.get_raw_token(ignore_auth_mode=True)
        with dashboard({None: (401, ""), f"Bearer {ray_s}": RAY}) as address:
            return ray_s, look_here(tmp_path, address)

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file, other = tmp_path / ".ray/auth_token", tmp_path / "other"
    file.parent.mkdir()
    assert look_here(tmp_path, None).token_from == ""
    for step, source in enumerate([file, other, "RAY_AUTH_TOKEN"]):
        token = f"{step}" * 40
        if isinstance(source, Path):
            source.write_text(f"{token}\n")
            source.chmod(0o640)
        if source == other:
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
        if source == "RAY_AUTH_TOKEN":
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        ray_s, facts = both()
        assert ray_s == token and facts.token_from == str(source)
        assert facts.token_mode == (0o640 if isinstance(source, Path) else None)
        assert facts.with_token == Answer(status=200, ray_version="2.60.0")
        assert facts.without_token == Answer(status=401)
        assert token not in repr(facts)

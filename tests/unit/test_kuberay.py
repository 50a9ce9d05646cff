"""The Kubernetes manifests and their image: known fields only, names that agree, nothing open."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render import render
from tmu_dist.train import parse_command

_ROOT = Path(__file__).parents[2]
_TEXT = (_ROOT / "cluster" / "kuberay.yaml").read_text()

# What the file may use of KubeRay 1.5.1 and Kubernetes. A name stands for the fields below it, a
# list for many of them, a type for a value, `dict` for a mapping of texts.
_RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"version": str, "idleTimeoutSeconds": int, "securityContext": "secured"},
    "headGroupSpec": {"serviceType": str, "rayStartParams": dict, "template": "pod"},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": dict,
            "template": "pod",
        }
    ],
}
_RAY_JOB = {
    "entrypoint": str,
    "suspend": bool,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "submissionMode": str,
    "submitterPodTemplate": "pod",
    "rayClusterSpec": _RAY_CLUSTER,
}
_PEER = {"podSelector": dict, "namespaceSelector": dict}
_NETWORK_POLICY = {
    "podSelector": dict,
    "policyTypes": [str],
    "ingress": [{"from": [_PEER], "ports": [{"port": int}]}],
}
_NAMED: dict[str, Any] = {
    "secured": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "resources": {"limits": dict, "requests": dict},
    "container": {
        "name": str,
        "image": str,
        "lifecycle": {"preStop": {"exec": {"command": [str]}}},
        "ports": [{"name": str, "containerPort": int}],
        "resources": "resources",
        "securityContext": "secured",
        "env": [{"name": str, "value": str}],
        "volumeMounts": [{"name": str, "mountPath": str}],
    },
    "pod": {
        "metadata": {"labels": dict, "annotations": dict},
        "spec": {
            "serviceAccountName": str,
            "automountServiceAccountToken": bool,
            "restartPolicy": str,
            "terminationGracePeriodSeconds": int,
            "tolerations": [{"key": str, "operator": str, "effect": str}],
            "securityContext": {
                "runAsNonRoot": bool,
                "runAsUser": int,
                "runAsGroup": int,
                "fsGroup": int,
                "seccompProfile": {"type": str},
            },
            "containers": ["container"],
            "volumes": [
                {
                    "name": str,
                    "emptyDir": {"medium": str, "sizeLimit": str},
                    "ephemeral": {
                        "volumeClaimTemplate": {
                            "spec": {"accessModes": [str], "resources": "resources"}
                        }
                    },
                }
            ],
        },
    },
}
_KINDS = {
    "ServiceAccount": ("v1", {}),
    "NetworkPolicy": ("networking.k8s.io/v1", _NETWORK_POLICY),
    "RayCluster": ("ray.io/v1", _RAY_CLUSTER),
    "RayJob": ("ray.io/v1", _RAY_JOB),
}


def unknown(value: Any, known: Any, where: str) -> Iterator[str]:
    """What of a value is not as the tables above say."""
    known = _NAMED.get(known, known) if isinstance(known, str) else known
    if isinstance(known, list):
        parts = value if isinstance(value, list) else [f"no list: {value!r}"]
        for number, part in enumerate(parts):
            yield from unknown(part, known[0], f"{where}[{number}]")
    elif isinstance(known, dict):
        for name, part in value.items():
            if name in known:
                yield from unknown(part, known[name], f"{where}.{name}")
            else:
                yield f"{where}.{name}"
    elif type(value) is not known:
        yield f"{where}: {value!r} is no {known.__name__}"


@pytest.fixture
def items() -> dict[str, Any]:
    """The manifests, by their kinds."""
    document = yaml.safe_load(_TEXT)
    assert (document["apiVersion"], document["kind"]) == ("v1", "List")
    return {item["kind"]: item for item in document["items"]}


@pytest.fixture
def pods(items: dict[str, Any]) -> dict[str, Any]:
    """Templates of all pods, by the name of their only container."""
    spec = items["RayCluster"]["spec"]
    templates = [spec["headGroupSpec"]["template"], items["RayJob"]["spec"]["submitterPodTemplate"]]
    templates += [group["template"] for group in spec["workerGroupSpecs"]]
    return {template["spec"]["containers"][0]["name"]: template for template in templates}


def pinned(package: str) -> str:
    (version,) = re.findall(
        rf"^{package}==(\S+)", (_ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    return version


def faults(items: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for kind, item in items.items():
        version, spec = _KINDS[kind]
        parts = {"apiVersion": str, "kind": str, "metadata": dict, "spec": spec}
        assert item["apiVersion"] == version
        found += unknown(item, parts, kind)
    return found


def test_every_field_is_known(items: dict[str, Any]) -> None:
    assert set(items) == set(_KINDS)
    assert faults(items) == []
    (worker,) = items["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    worker["maxReplica"] = worker.pop("maxReplicas")
    worker["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "8080"
    assert faults({"RayJob": items["RayJob"]}) == [
        "RayJob.spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].ports[0]"
        ".containerPort: '8080' is no int",
        "RayJob.spec.rayClusterSpec.workerGroupSpecs[0].maxReplica",
    ]


def test_names_and_versions_agree(items: dict[str, Any], pods: dict[str, Any]) -> None:
    cluster = items["RayCluster"]["spec"]
    assert items["RayJob"]["spec"]["rayClusterSpec"] == cluster
    assert cluster["rayVersion"] == pinned("ray")
    assert len({pod["spec"]["containers"][0]["image"] for pod in pods.values()}) == 1
    label = items["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for name, pod in pods.items():
        spec = pod["spec"]
        (container,) = spec["containers"]
        assert label.items() <= pod["metadata"]["labels"].items(), "the policy is not for it"
        account = spec.get("serviceAccountName")
        assert account == (
            None if "submitter" in name else items["ServiceAccount"]["metadata"]["name"]
        )
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
        assert mounts.keys() == {volume["name"] for volume in spec.get("volumes", [])}
        variables = {each["name"]: each["value"] for each in container.get("env", [])}
        if mounts:
            assert variables["TMU_DIST_CACHE"] == mounts["cache"]
    for item in items.values():
        assert item["metadata"]["labels"]["part"] in ("access", "cluster", "job")


def test_nothing_is_open_and_nothing_secret(items: dict[str, Any], pods: dict[str, Any]) -> None:
    cluster = items["RayCluster"]["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "dashboard-host" not in cluster["headGroupSpec"]["rayStartParams"]
    for rule in items["NetworkPolicy"]["spec"]["ingress"]:
        for peer in rule["from"]:
            assert peer["podSelector"]["matchLabels"], "pods of anybody"
    assert "RAY_AUTH_TOKEN" not in {each["name"] for each in head(pods)["env"]}
    assert not re.search(r"(?i)(secret_access_key|password|stringData|kind: Secret)", _TEXT)
    contexts = [cluster["autoscalerOptions"]["securityContext"]]
    for pod in pods.values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] > 0
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        contexts.append(pod["spec"]["containers"][0]["securityContext"])
    for context in contexts:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def head(pods: dict[str, Any]) -> dict[str, Any]:
    (container,) = pods["ray-head"]["spec"]["containers"]
    return container


def test_only_workers_have_gpus_and_the_head_ends_last(pods: dict[str, Any]) -> None:
    worker, first = pods["ray-worker"]["spec"], pods["ray-head"]["spec"]
    resources = worker["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] >= 1
    assert resources["limits"] == resources["requests"], "Ray counts limits, Kubernetes requests"
    assert "nvidia.com/gpu" not in head(pods)["resources"]["limits"]
    variables = {each["name"]: each["value"] for each in head(pods)["env"]}
    saving = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    sleep, seconds = head(pods)["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep" and saving < int(seconds) < first["terminationGracePeriodSeconds"]
    assert saving < worker["terminationGracePeriodSeconds"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) < int(seconds)
    for pod in (worker, first):
        assert pod["restartPolicy"] == "Never", "what the autoscaler v2 asks for"


def test_ray_has_the_variables_that_it_has_on_other_clusters(pods: dict[str, Any]) -> None:
    script = (_ROOT / "cluster" / "node_env.sh").read_text()
    there = dict(re.findall(r"^export (\w+)=([\w.]+)(?:\s|$)", script, re.MULTILINE))
    assert there.pop("RAY_AUTH_MODE") == "token"  # authOptions sets it here
    here = {each["name"]: each["value"] for each in head(pods)["env"]}
    assert there and there.items() <= here.items()


def test_the_command_is_one(items: dict[str, Any]) -> None:
    python, m, module, *flags = shlex.split(items["RayJob"]["spec"]["entrypoint"])
    assert [python, m, module] == ["python", "-m", "tmu_dist.train"]
    config = parse_command(flags).config
    assert config.output.startswith("s3://") and config.scale.worker_range == (1, 8)


def test_knobs_change_all_that_they_should() -> None:
    values = {"image": "me/tmu:2", "max-workers": "3", "gpus-per-worker": "4", "suspend": "true"}
    rendered = yaml.safe_load(render(_TEXT, values))
    *_, cluster, job = rendered["items"]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"] and job["spec"]["suspend"] is True
    text = yaml.safe_dump(rendered)
    assert text.count("image: me/tmu:2") == text.count("image: ") > 0
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert group["maxReplicas"] == 3
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert {each["nvidia.com/gpu"] for each in resources.values()} == {4}


def test_the_image_holds_what_it_copies_and_the_pinned_versions(pods: dict[str, Any]) -> None:
    text = (_ROOT / "cluster" / "Dockerfile").read_text()
    copied = {
        word
        for words in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
        for word in words.split()
    }
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= copied
    assert {"constraints.txt", "pyproject.toml", project["project"]["readme"]} <= copied
    ignored = (_ROOT / "cluster" / "Dockerfile.dockerignore").read_text().split()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((_ROOT / name).exists() for name in copied)

    assert "-c constraints.txt" in text
    (extras,) = re.findall(r"-e '\.\[(.+)\]'", text)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", text, re.MULTILINE)
    least = project["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.split(".")))
    user = pods["ray-worker"]["spec"]["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in text

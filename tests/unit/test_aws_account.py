"""Ray's own code for AWS starts what gpu.yaml says, with the rights that cluster/policies gives.

AWS is moto here. It knows which actions a policy names and, for S3, on what; conditions it does
not know, and machines of it are only noted down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tmu_dist.data import storage

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")

_CLUSTER = Path(__file__).parents[2] / "cluster"
_REGION = "us-west-2"
_TAGS = {
    "ray-node-type": "worker",
    "ray-node-name": "ray-tmu-gpu-worker",
    "ray-launch-config": "hash",
    "ray-node-status": "uninitialized",
}
"""What Ray's autoscaler gives a new machine."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `ray up` makes of gpu.yaml in an account that was prepared, twice.

    Ray's key goes to a home folder of the tests.
    """
    from ray.autoscaler._private.commands import _bootstrap_config

    from cluster.aws_account import make_group, make_roles

    with pytest.MonkeyPatch.context() as monkeypatch, moto.mock_aws():
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
        for address in ("198.51.100.0/24", "203.0.113.7/32"):
            make_roles(boto3.client("iam", region_name=_REGION), "mine")
            make_group(boto3.client("ec2", region_name=_REGION), [address])
        written = yaml.safe_load((_CLUSTER / "gpu.yaml").read_text())
        yield _bootstrap_config(written, no_config_cache=True)


def _key_of(iam: Any, user: str, rights: dict[str, Any]) -> dict[str, str]:
    """The key of a new user that has just these rights."""
    iam.create_user(UserName=user)
    iam.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=json.dumps(rights))
    key = iam.create_access_key(UserName=user)["AccessKey"]
    return {
        "aws_access_key_id": key["AccessKeyId"],
        "aws_secret_access_key": key["SecretAccessKey"],
    }


def test_machines_come_as_the_file_says(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    ec2 = boto3.client("ec2", region_name=_REGION)
    machines = {}
    for kind, node_type in config["available_node_types"].items():
        (number,) = provider.create_node(node_type["node_config"], dict(_TAGS), 1)
        reservations = ec2.describe_instances(InstanceIds=[number])["Reservations"]
        machines[kind] = reservations[0]["Instances"][0]

    def volume(kind: str) -> dict[str, Any]:
        (disk,) = machines[kind]["BlockDeviceMappings"]
        assert disk["DeviceName"] == machines[kind]["RootDeviceName"]
        assert disk["Ebs"]["DeleteOnTermination"]
        return ec2.describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"][0]

    for kind, machine in machines.items():
        role = "tmu-dist-head" if kind == "head" else "tmu-dist-worker"
        assert machine["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/{role}")
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert machine["Placement"]["AvailabilityZone"] == "us-west-2b"
        assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["tmu-dist"]
        assert (machine.get("InstanceLifecycle") == "spot") == (kind == "gpu_spot")
        assert machine["ImageId"].startswith("resolve:ssm:/aws/service/")
        assert ("nvidia" in machine["ImageId"]) == kind.startswith("gpu")
        assert volume(kind)["Size"] == (200 if kind.startswith("gpu") else 100)
        assert volume(kind)["Encrypted"] and volume(kind)["VolumeType"] == "gp3"

    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu_spot"]["resources"].items() >= {"CPU": 8, "GPU": 1}.items()
    provider.terminate_nodes(provider.non_terminated_nodes({}))  # as `ray down` does
    assert {instance["State"]["Name"] for instance in _instances(ec2)} == {"terminated"}


def _instances(ec2: Any) -> list[dict[str, Any]]:
    return [
        instance
        for reservation in ec2.describe_instances()["Reservations"]
        for instance in reservation["Instances"]
    ]


@pytest.mark.parametrize(
    ("wanted", "refused", "started"),
    [
        ({"GPU": 1}, {}, {"gpu_spot": 3}),
        ({"GPU": 1}, {"gpu_spot": 0.0}, {"gpu_on_demand": 3}),  # AWS had no spot machines
        ({"CPU": 1}, {}, {"cpu": 1}),
    ],
)
def test_work_starts_the_machines_it_needs(
    config: dict[str, Any],
    wanted: dict[str, float],
    refused: dict[str, float],
    started: dict[str, int],
) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    allowed = json.loads(json.dumps(config))
    allowed["available_node_types"]["gpu_on_demand"]["max_workers"] = 8
    allowed["available_node_types"]["gpu_spot"]["min_workers"] = 0
    settings = AutoscalingConfig(
        {key: value for key, value in allowed.items() if key != "head_node"},
        skip_content_hash=True,
    )
    one = ResourceRequestUtil.make(wanted)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=settings.get_node_type_configs(),
        max_num_nodes=settings.get_max_num_nodes(),
        resource_requests=[ResourceRequestByCount(request=one, count=3)],
        recoverable_resource_availabilities=refused,
    )

    reply = ResourceDemandScheduler(None).schedule(request)

    assert {launch.instance_type: launch.count for launch in reply.to_launch} == started


def test_only_the_last_given_addresses_may_log_in(config: dict[str, Any]) -> None:
    from cluster.aws_account import make_group

    ec2 = boto3.client("ec2", region_name=_REGION)
    # Ray has left the group as it was.
    (group,) = ec2.describe_security_groups(GroupNames=["tmu-dist"])["SecurityGroups"]
    by_address = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    (within,) = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [
        (rule["FromPort"], rule["ToPort"], [range_["CidrIp"] for range_ in rule["IpRanges"]])
        for rule in by_address
    ] == [(22, 22, ["203.0.113.7/32"])]
    assert within["UserIdGroupPairs"][0]["GroupId"] == group["GroupId"]

    everybody = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
    everybody["IpRanges"] = [{"CidrIp": "0.0.0.0/0"}]  # as Ray makes a group that is missing
    ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[everybody])
    make_group(ec2, ["203.0.113.7/32"])
    (group,) = ec2.describe_security_groups(GroupNames=["tmu-dist"])["SecurityGroups"]
    assert "0.0.0.0/0" not in json.dumps(group["IpPermissions"])


def test_the_head_has_the_rights_to_start_and_end_workers_and_workers_have_not(
    config: dict[str, Any],
) -> None:
    from botocore.exceptions import ClientError
    from moto.core import set_initial_no_auth_action_count
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    iam = boto3.client("iam", region_name=_REGION)
    rights = iam.get_role_policy(RoleName="tmu-dist-head", PolicyName="aws_head")["PolicyDocument"]
    for statement in rights["Statement"]:  # which moto does not know for EC2
        statement.pop("Condition", None)
        statement["Resource"] = "*"
    as_head = {"aws_credentials": _key_of(iam, "like-the-head", rights)}
    assert iam.list_role_policies(RoleName="tmu-dist-worker")["PolicyNames"] == ["aws_storage"]
    worker = config["available_node_types"]["gpu_spot"]["node_config"]

    @set_initial_no_auth_action_count(0)
    def with_rights_asked_for() -> None:
        provider = AWSNodeProvider(config["provider"] | as_head, config["cluster_name"])
        (number,) = provider.create_node(dict(worker), dict(_TAGS), 1)
        assert provider.non_terminated_nodes({}) == [number]
        provider.set_node_tags(number, {"ray-node-status": "up-to-date"})
        provider.terminate_nodes([number])
        assert provider.non_terminated_nodes({}) == []

        with pytest.raises(ClientError, match="not authorized"):
            provider.ec2.meta.client.create_security_group(GroupName="other", Description="x")

    with_rights_asked_for()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bucket `mine`, reached with the rights of aws_storage.json, in a server in this process."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    admin = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": _REGION}
    boto3.client("s3", endpoint_url=endpoint, **admin).create_bucket(
        Bucket="mine", CreateBucketConfiguration={"LocationConstraint": _REGION}
    )
    boto3.client("s3", endpoint_url=endpoint, **admin).put_object(
        Bucket="mine", Key="data/archive/manifest.json", Body=b"{}"
    )
    rights = json.loads(
        (_CLUSTER / "policies" / "aws_storage.json").read_text().replace("BUCKET", "mine")
    )
    for statement in rights["Statement"]:
        statement.pop("Condition", None)
    key = _key_of(boto3.client("iam", endpoint_url=endpoint, **admin), "like-a-worker", rights)
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from here on, who asks?
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": key["aws_secret_access_key"],
        "AWS_REGION": _REGION,
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    server.stop()


def test_the_rights_of_storage_are_enough_and_end_there(bucket: None) -> None:
    home, data = "s3://mine/tmu/runs/x", "s3://mine/data/archive"

    storage.write_bytes(home, "weights", bytes(12_000_000))  # in parts
    assert storage.object_size(home, "weights") == 12_000_000
    assert storage.list_paths(home) == ["weights"]
    assert len(storage.read_range(home, "weights", 5, 10)) == 10
    assert not storage.exists(home, "nothing")
    storage.delete_many(home, ["weights"])
    assert storage.list_paths(home) == []
    assert storage.read_bytes(data, "manifest.json") == b"{}"
    assert storage.list_paths(data) == ["manifest.json"]

    with pytest.raises(storage.StorageError):
        storage.write_bytes(data, "manifest.json", b"other")
    with pytest.raises(storage.StorageError):
        storage.read_bytes("s3://mine/others", "secret")

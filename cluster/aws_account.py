"""Prepare an AWS account for `ray up cluster/gpu.yaml`; given again, it corrects what is there.

    python cluster/aws_account.py --bucket BUCKET --ssh-from 203.0.113.7/32

It makes the roles tmu-dist-head and tmu-dist-worker with the rights of cluster/policies and no
others, and the security group tmu-dist, which only the given addresses may enter, by SSH. The
bucket must exist: data/ in it is read, tmu/ written. Who runs this must administer IAM and EC2.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import yaml

_HERE = Path(__file__).parent
_NAME = "tmu-dist"
_ROLES = {"head": ("aws_head", "aws_storage"), "worker": ("aws_storage",)}
"""Rights of each kind of node, by the names of the files."""
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    ],
}


def main() -> None:
    """Prepare the account that boto3 finds in the environment or in ~/.aws."""
    region = yaml.safe_load((_HERE / "gpu.yaml").read_text())["provider"]["region"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", required=True, help="name of the S3 bucket for data and runs")
    parser.add_argument(
        "--ssh-from",
        required=True,
        nargs="+",
        type=ipaddress.IPv4Network,
        help="from where one may log in, such as 203.0.113.7/32",
    )
    parser.add_argument("--region", default=region, help=f"as in the cluster's file ({region})")
    given = parser.parse_args()
    make_roles(boto3.client("iam", region_name=given.region), given.bucket)
    make_group(
        boto3.client("ec2", region_name=given.region), [str(part) for part in given.ssh_from]
    )


def make_roles(iam: Any, bucket: str) -> None:
    """Make a role and an instance profile for each kind of node, with just the rights of its files.

    Args:
        iam: client of boto3.
        bucket: takes the place of BUCKET in the files.
    """
    there = (iam.exceptions.EntityAlreadyExistsException, iam.exceptions.InvalidInputException)
    for kind, policies in _ROLES.items():
        name = f"{_NAME}-{kind}"
        with suppress(*there):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(_TRUST))
        for policy in policies:
            rights = (_HERE / "policies" / f"{policy}.json").read_text().replace("BUCKET", bucket)
            iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=rights)
        with suppress(*there):
            iam.create_instance_profile(InstanceProfileName=name)
        with suppress(iam.exceptions.LimitExceededException):  # it has its role
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    with suppress(*there):
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")


def make_group(ec2: Any, ssh_from: list[str]) -> None:
    """Make the security group of all nodes in the default network; it lets in SSH, and its own.

    Args:
        ec2: client of boto3.
        ssh_from: networks from which SSH is let in; others that were are shut out.

    Raises:
        SystemExit: the region has no default network.
    """
    networks = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not networks:
        raise SystemExit("This region has no default VPC: make one, or choose another --region.")
    network = networks[0]["VpcId"]
    chosen = [{"Name": "vpc-id", "Values": [network]}, {"Name": "group-name", "Values": [_NAME]}]
    found = ec2.describe_security_groups(Filters=chosen)["SecurityGroups"]
    group = found[0]["GroupId"] if found else _new_group(ec2, network)
    open_to = [
        {key: value for key, value in rule.items() if key != "UserIdGroupPairs"}
        for rule in (found[0]["IpPermissions"] if found else [])
        if any(rule.get(source) for source in ("IpRanges", "Ipv6Ranges", "PrefixListIds"))
    ]
    if open_to:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=open_to)
    ranges = [{"CidrIp": address} for address in ssh_from]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": ranges}],
    )


def _new_group(ec2: Any, network: str) -> str:
    """Make the group, open to itself only, and return its id."""
    group = ec2.create_security_group(
        GroupName=_NAME, VpcId=network, Description="Nodes of tmu-dist clusters"
    )["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}],
    )
    return group


if __name__ == "__main__":
    main()

"""Findings in fewer words; and the same one of several nodes told once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tmu_dist.doctor.findings import Finding, Status
from tmu_dist.doctor.nodes import NodeFacts


def told_once(findings: Sequence[Finding], nodes: Sequence[NodeFacts]) -> list[Finding]:
    """The same findings with those that say the same of several nodes made one."""
    groups: dict[tuple[str, Status, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.check, finding.status, finding.found), []).append(finding)
    told = []
    for (check, status, found), same in groups.items():
        where = ", ".join(finding.where for finding in same)
        told.append(
            Finding(
                check=check,
                status=status,
                found=found,
                advice=same[0].advice,
                where="" if len(same) == len(nodes) > 1 else where,
                numbers=same[0].numbers,
            )
        )
    return told


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, status="ok", found=found)


def warning(
    check: str, found: str, advice: str, where: str = "", numbers: Mapping[str, float] = {}
) -> Finding:
    return Finding(
        check=check, status="warning", found=found, advice=advice, where=where, numbers=numbers
    )


def fault(
    check: str, found: str, advice: str, where: str = "", numbers: Mapping[str, float] = {}
) -> Finding:
    return Finding(
        check=check, status="fault", found=found, advice=advice, where=where, numbers=numbers
    )

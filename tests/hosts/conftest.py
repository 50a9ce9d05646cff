"""Three machines with one Ray over them, for tests that take them apart and mend them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.machines import Cluster, machines, why_not


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that trains nothing and where commands are given, and two nodes of one CPU each."""
    if reason := why_not():
        pytest.skip(reason)
    with machines(3, tmp_path_factory.mktemp("machines")) as made:
        cluster = Cluster(made[0], tuple(made[1:]))
        cluster.start()
        yield cluster

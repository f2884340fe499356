"""The lab that the tests with real hosts share.

`lab` is one lab for the whole run, with agents that trust each other. A test that breaks hosts mends them before it
ends. What tells why a test failed is copied to KVMHV_EVIDENCE (default /var/tmp/kvmhv-evidence), one directory a test.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmhv.lab import lab as labs
from kvmhv.lab.guest_images import GuestImages, ensure_guest_images
from kvmhv.lab.lab import Lab
from kvmhv.lab.plan import AGENT_HOSTS
from kvmhv.lab.state import known_labs
from tests.real.moving import Pair

EVIDENCE = Path(os.environ.get("KVMHV_EVIDENCE", "/var/tmp/kvmhv-evidence"))
TEST_TIMEOUT_S = 300
HASTY = """
[locations]
small = "/var/lib/kvmhv-small"
[timeouts]
memory_idle_s = 8.0
storage_idle_s = 8.0
reconnect_s = 8.0
"""
_OWN_LABS = re.compile(r"pytest-[a-z]+-(\d+)")
_failed = pytest.StashKey[bool]()


def lab_name(purpose: str) -> str:
    """Return the name of a lab that this process may make: two runs at once do not meet."""
    return f"pytest-{purpose}-{os.getpid()}"[:20]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count a test's time without its fixtures: the first lab may have to build its tree."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S, func_only=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep the evidence of a failed test while the hosts still have it."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Lab):
                directory = EVIDENCE / re.sub(r"[^A-Za-z0-9_.-]+", "_", item.nodeid)[-120:]
                if report.when == "call":  # a teardown that fails too comes after it, and its hosts may be gone
                    shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True, exist_ok=True)
                value.evidence(directory)
                report.sections.append(("evidence", f"logs of the lab's hosts: {directory}"))
    return report


@pytest.fixture(scope="session")
def _lab_ground() -> None:
    """Refuse what cannot work, and remove the labs of test runs that were killed."""
    assert os.geteuid() == 0, "hosts in namespaces need root"
    _end_labs_of_the_dead()


def pytest_unconfigure() -> None:
    """End the labs of workers that did not come to it: an interrupted run ends them where they stand."""
    if os.geteuid() == 0:
        _end_labs_of_the_dead()


def _end_labs_of_the_dead() -> None:
    for name in known_labs():
        found = _OWN_LABS.fullmatch(name)
        if found is not None and not Path(f"/proc/{found[1]}").exists():
            labs.down(name)


@pytest.fixture(scope="session")
def lab(_lab_ground: None) -> Iterator[Lab]:
    """Return host1 and host2 with agents that trust each other, and a client; the migration network is unlimited.

    The agents wait for a lost or silent peer for seconds instead of minutes, and have a location `small` as well, for a
    small file system to be mounted there.
    """
    yield from _lab_for_a_while(Lab.up(lab_name("main"), progress=print), _make_hasty)


def _make_hasty(lab: Lab) -> None:
    for name in AGENT_HOSTS:
        host = lab.host(name)
        host.exec(["sh", "-c", "mkdir -p /var/lib/kvmhv-small && cat >> /etc/kvmhv/agent.toml"], text=HASTY)
        host.agent_stop()
        host.agent_start()


@pytest.fixture(scope="session")
def bare_lab(_lab_ground: None) -> Iterator[Lab]:
    """Return a lab of hosts without agents, with 100 Mbit/s between them on the migration network."""
    yield from _lab_for_a_while(Lab.up(lab_name("bare"), rate="100mbit", agents=False, progress=print))


@pytest.fixture(scope="session")
def images(_lab_ground: None) -> GuestImages:
    """Return the guests, built if they are not there."""
    return ensure_guest_images(print)


@pytest.fixture
def pair(lab: Lab, images: GuestImages) -> Iterator[Pair]:
    """Return the lab's two hosts for moves; both must be as they were afterwards, whatever happened in between."""
    used = Pair(lab, images)
    before = [side.settled() for side in used.sides]
    yield used
    used.clear()
    for side, empty in zip(used.sides, before, strict=True):
        side.is_again(empty)


def _lab_for_a_while(lab: Lab, prepare: Callable[[Lab], None] = lambda lab: None) -> Iterator[Lab]:
    try:
        prepare(lab)
        yield lab
    finally:
        lab.down()
    assert lab.leftovers() == []

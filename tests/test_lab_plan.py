import ipaddress

import msgspec
import pytest

from kvmhv.errors import CallerError
from kvmhv.lab import plan as plans
from kvmhv.lab.plan import LabPlan, make_plan, parse_namespace


def test_a_lab_has_three_hosts_with_an_address_in_each_network() -> None:
    plan = make_plan("lab", rate="400mbit")
    assert [(host.name, host.agent) for host in plan.hosts] == [("host1", True), ("host2", True), ("client", False)]
    addresses = [address for host in plan.hosts for address in host.addresses.values()]
    assert len(set(addresses)) == 9
    for network in plan.networks:
        subnet = ipaddress.ip_network(network.subnet)
        assert all(ipaddress.ip_address(host.addresses[network.name]) in subnet for host in plan.hosts)
    assert {network.name: network.rate for network in plan.networks} == {
        "management": None,
        "migration": "400mbit",
        "lan": None,
    }


def test_hosts_of_all_labs_are_different_machines_and_stay_the_same_ones() -> None:
    ids = [host.machine_id for name in ("a", "b") for host in make_plan(name).hosts]
    assert len(set(ids)) == 6
    assert all(len(machine_id) == 32 for machine_id in ids)
    assert make_plan("a") == make_plan("a")


def test_a_plan_survives_its_json() -> None:
    plan = make_plan("lab", rate="1gbit", suites={"host2": "bookworm"}, agents=False)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=LabPlan) == plan
    assert plan.host("host2").suite == "bookworm"
    assert not any(host.agent for host in plan.hosts)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"name": ""}, "lab-name"),
        ({"name": "../x"}, "lab-name"),
        ({"name": "Lab"}, "lab-name"),
        ({"name": "a" * 21}, "lab-name"),
        ({"name": "ü"}, "lab-name"),
        ({"name": "lab", "rate": "fast"}, "lab-rate"),
        ({"name": "lab", "rate": "0mbit"}, "lab-rate"),
        ({"name": "lab", "rate": "400 mbit"}, "lab-rate"),
        ({"name": "lab", "suites": {"host2": "sarge"}}, "lab-suite"),
        ({"name": "lab", "suites": {"host3": "trixie"}}, "lab-host-unknown"),
        ({"name": "lab", "hosts": ["switch"]}, "lab-host-name"),
        ({"name": "lab", "hosts": ["a-b"]}, "lab-host-name"),
        ({"name": "lab", "hosts": ["a", "a"]}, "lab-hosts"),
        ({"name": "lab", "hosts": []}, "lab-hosts"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(arguments: dict[str, object], code: str) -> None:
    with pytest.raises(CallerError) as caught:
        make_plan(**arguments)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_unknown_hosts_and_networks_name_the_known_ones() -> None:
    plan = make_plan("lab")
    with pytest.raises(CallerError, match="host9") as caught:
        plan.host("host9")
    assert "host1, host2, client" in caught.value.todo
    with pytest.raises(CallerError, match="storage") as caught:
        plan.network("storage")
    assert "migration" in caught.value.todo


@pytest.mark.parametrize(("rate", "bits"), [("400mbit", 400_000_000), ("50kbit", 50_000), ("10gbit", 10_000_000_000)])
def test_rates(rate: str, bits: int) -> None:
    assert plans.rate_bits_per_second(rate) == bits


def test_a_namespace_belongs_to_exactly_one_lab() -> None:
    assert parse_namespace(plans.namespace("a", "host1")) == ("a", "host1")
    assert parse_namespace(plans.namespace("a-b", "host1")) == ("a-b", "host1")
    assert parse_namespace(plans.namespace("a-b", plans.SWITCH)) == ("a-b", "switch")
    for stranger in ("kvmhv", "kvmhv-host1", "other-lab-host1", "kvmhv--host1", "kvmhv-lab-", "cni-1234"):
        assert parse_namespace(stranger) is None


def test_names_of_interfaces_fit_into_the_kernels_15_characters() -> None:
    plan = make_plan("lab", hosts=("a" * 10,))
    lines = plans.switch_lines(plan) + plans.port_lines(plan, "a" * 10) + plans.host_lines(plan, "a" * 10)
    words = [line.split() for line in lines]
    names = {line[line.index("name") + 1] for line in words if "name" in line} | {plans.port("a" * 10, "migration")}
    assert len(names) >= 4
    assert all(len(name) <= 15 for name in names | set(plans.NETWORKS))


def test_only_the_migration_network_gets_a_rate_and_a_burst_that_carries_it() -> None:
    assert plans.rate_lines(make_plan("lab")) == []
    assert plans.rate_lines(make_plan("lab", rate="400mbit")) == [
        "qdisc add dev migration root tbf rate 400mbit burst 65536 latency 50ms"
    ]
    assert "burst 1250000 " in plans.rate_lines(make_plan("lab", rate="10gbit"))[0]


def test_interfaces_have_addresses_of_their_own() -> None:
    plan = make_plan("lab")
    macs = {plans.mac(plan, host.name, network) for host in plan.hosts for network in plans.NETWORKS}
    assert len(macs) == 9
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs), "locally administered, unicast"


def test_every_name_resolves_to_its_network() -> None:
    table = {
        name: line.split()[0]
        for line in plans.etc_hosts(make_plan("lab")).splitlines()
        if not line.startswith(":")
        for name in line.split()[1:]
    }
    assert table["host2"] == table["host2-management"] == "10.77.1.12"
    assert table["host1-migration"] == "10.77.2.11"
    assert table["client-lan"] == "10.77.3.13"

"""One interface for gloo on machines that have several."""

import socket
from collections import namedtuple

import psutil
import pytest

from imm_scale.parallel import network, world
from imm_scale.parallel.world import World

Address = namedtuple("Address", "family address")
State = namedtuple("State", "isup")
V4, V6, LINK = socket.AF_INET, socket.AF_INET6, psutil.AF_LINK

NODE = {
    "lo": [Address(V4, "127.0.0.1"), Address(V6, "::1")],
    "docker0": [Address(V4, "172.17.0.1")],
    "eno1": [Address(LINK, "aa:bb:cc:dd:ee:ff"), Address(V4, "10.0.0.5")],
    "ib0": [Address(V4, "10.1.0.5"), Address(V6, "fe80::5%ib0")],
    "ib1": [Address(V4, "10.2.0.5")],
    "down0": [Address(V4, "10.1.0.6")],
    "bond": [Address(LINK, "aa:bb:cc:dd:ee:00")],
}
# From where packets to these hosts leave: the first node's own name is on its loopback, as Debian has it.
ROUTES = {"node1": "127.0.1.1", "node2": "10.1.0.5", "mgmt2": "10.0.0.5", "node6": "fe80::5", "down": "10.1.0.6"}


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: NODE)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: State(name != "down0") for name in NODE})
    monkeypatch.setattr(network, "_source_address", ROUTES.get)


@pytest.mark.parametrize(
    ("hosts", "env", "chosen"),
    [
        (["node2"], {}, "ib0"),
        (["mgmt2"], {}, "eno1"),
        (["node6"], {}, "ib0"),
        (["node1", "node1", "node2"], {}, "ib0"),
        (["node1"], {}, None),
        (["nowhere", "down"], {}, None),
        (["node2"], {"GLOO_SOCKET_IFNAME": "eno1"}, "eno1"),
        (["node2"], {"GLOO_SOCKET_IFNAME": "a,b", "NCCL_SOCKET_IFNAME": "ib1"}, "a,b"),
        (["node2"], {"NCCL_SOCKET_IFNAME": "^lo,docker0"}, "ib0"),
        (["node2"], {"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        (["mgmt2"], {"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        (["node2"], {"NCCL_SOCKET_IFNAME": "=ib1"}, "ib1"),
        (["node2"], {"NCCL_SOCKET_IFNAME": "eno1:4000"}, "eno1"),
        (["node1"], {"NCCL_SOCKET_IFNAME": "ib1"}, "ib1"),
        (["node2"], {"NCCL_SOCKET_IFNAME": "^ib"}, None),
        (["node2"], {"NCCL_SOCKET_IFNAME": "nothing"}, None),
    ],
)
def test_the_interface_on_the_way_to_the_others(hosts, env, chosen, node):
    assert network.gloo_interface(hosts, env) == chosen


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("ib", {"ib0", "ib1"}),
        ("=ib", set()),
        ("=ib0,eno1", {"ib0", "eno1"}),
        ("^lo,docker", {"eno1", "ib0", "ib1", "down0", "bond"}),
        ("^=ib0", set(NODE) - {"ib0"}),
    ],
)
def test_nccls_patterns(pattern, allowed):
    assert {name for name in NODE if network.allows(pattern, name)} == allowed


def test_this_machines_own_route_leads_over_its_loopback():
    assert network._source_address("127.0.0.1") == "127.0.0.1"
    assert network._source_address("no such host") is None
    assert network.gloo_interface(["127.0.0.1"], {}) is None
    for addresses in network.interfaces().values():
        assert not any(address.startswith("127.") for address in addresses)


@pytest.mark.parametrize(("hosts", "expected"), [("node1 node2", "ib0"), ("", None)])
def test_ranks_start_gloo_over_it(hosts, expected, node, monkeypatch):
    """The first node, whose MASTER_ADDR is its loopback, learns of the others from the launcher's HOSTS."""
    monkeypatch.setattr(world.os, "environ", {})
    seen = []
    monkeypatch.setattr(world.dist, "is_initialized", lambda: False)  # whatever ran in this process before
    monkeypatch.setattr(
        world.dist,
        "init_process_group",
        lambda **options: seen.append(world.os.environ.get("GLOO_SOCKET_IFNAME")),
    )
    world.init(World(0, 2, 0), {"MASTER_ADDR": "node1", "MASTER_PORT": "1", "HOSTS": hosts})
    assert seen == [expected]

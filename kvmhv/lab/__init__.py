"""Hosts on one machine: what the demo, the tests and the benchmarks stand on.

Each host has its own network, mount, PID, UTS and IPC namespace, an overlay root on one cached Debian tree, and its own
agent; bridges in a namespace of their own join the hosts, so the machine's own network stays as it was. Rooms:

    plan.py       pure: names, addresses, and the `ip`/`tc` lines that make the networks
    state.py      where things are on the machine, the state file, the lock, `socket_of`
    tree.py       the cached Debian trees; steps.py runs their build steps and says what failed
    network.py    namespaces, links, rate; processes.py finds, kills and freezes what runs in them
    root.py       the first stage of a host: its mounts (runs before its root is there, standard library only)
    init.py       PID 1 of a host (runs in the tree, standard library only); control.py talks to it
    agents.py     the agents' configuration and the trust between them
    lab.py        Lab and LabHost: the interface for everyone else

A host can be killed, booted again with the same disks, frozen, and cut off from a network:

    lab = Lab.up("mine", rate="400mbit")
    lab.host("host1").exec(["ip", "address"])
    lab.host("host2").kill()
    lab.down()
"""

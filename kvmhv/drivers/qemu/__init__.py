"""QEMU over QMP: processes that outlive the agent, disks, moves.

driver.py    Qemu, which implements ports.Hypervisor
instance.py  one VM's QEMU: process, QMP, what happens when it ends
argv.py      the command line (pure)      graph.py   the block graph (pure)
process.py   processes by pidfd           qmp.py     one QMP connection
blocks.py    exports and mirrors          memory.py  the memory migration      keys.py  the move's key
nodes.py     what QEMU says of its block nodes
probe.py     what QEMU and KVM can do     rundir.py  the VM's directory
"""

from kvmhv.drivers.qemu.driver import Qemu

__all__ = ["Qemu"]

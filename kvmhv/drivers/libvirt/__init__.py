"""libvirt: guests that it runs on this host are shown, started, stopped and moved through it alone.

The library (libvirt-python) is imported when libvirt's socket is there, and nowhere else in the house.
"""

from kvmhv.drivers.libvirt.driver import Libvirt

__all__ = ["Libvirt"]

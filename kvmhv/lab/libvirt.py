"""libvirtd on hosts of a lab that stand on the tree `libvirt`, started by hand as a distribution would start it.

Debian's libvirt 11, without systemd and cgroups. Hosts reach each other's libvirtd over TLS with certificates of one
authority, and over plain TCP on the management network (the benchmark); QEMU's own channels have the same certificates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvmhv.errors import HostError
from kvmhv.lab.lab import LabHost

START_S = 60.0
LIBVIRTD_CONF = """
listen_tls = 1
listen_tcp = 1
listen_addr = "{address}"
auth_tcp = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
host_uuid = "{uuid}"
"""
QEMU_CONF = """
cgroup_controllers = []
namespaces = []
security_driver = "none"
user = "root"
group = "root"
stdio_handler = "file"
remember_owner = 0
migrate_tls_x509_cert_dir = "/etc/pki/qemu"
migrate_tls_x509_verify = 0
nbd_tls_x509_cert_dir = "/etc/pki/qemu"
"""
AUTHORITY = """
set -e
mkdir -p {out}; cd {out}
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=lab -keyout ca-key.pem -out ca-cert.pem \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign 2>/dev/null
"""
CERTIFICATE = """
set -e
cd {out}
openssl req -newkey rsa:2048 -nodes -subj /CN={host} -keyout {host}-key.pem -out {host}.csr 2>/dev/null
printf 'subjectAltName=DNS:{host},{ips}\\nextendedKeyUsage=serverAuth,clientAuth\\n' > {host}.ext
openssl x509 -req -days 2 -in {host}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -extfile {host}.ext \
    -out {host}-cert.pem 2>/dev/null
"""
PLACES = {
    "ca-cert.pem": ("/etc/pki/CA/cacert.pem", "/etc/pki/qemu/ca-cert.pem"),
    "{host}-cert.pem": (
        "/etc/pki/libvirt/servercert.pem",
        "/etc/pki/libvirt/clientcert.pem",
        "/etc/pki/qemu/server-cert.pem",
        "/etc/pki/qemu/client-cert.pem",
    ),
    "{host}-key.pem": (
        "/etc/pki/libvirt/private/serverkey.pem",
        "/etc/pki/libvirt/private/clientkey.pem",
        "/etc/pki/qemu/server-key.pem",
        "/etc/pki/qemu/client-key.pem",
    ),
}
"""Where libvirt and QEMU look for each file."""


class Libvirt:
    """libvirtd on some hosts. Everything ends with the lab."""

    def __init__(self, hosts: Sequence[LabHost]) -> None:
        """Configure and start each; HostError `bench-step` when one does not answer."""
        self.hosts = tuple(hosts)
        self._certify()
        for number, host in enumerate(self.hosts, 1):
            address = host.plan.addresses["management"]
            uuid = f"{number}0000000-0000-4000-8000-00000000000{number}"
            host.path("/etc/libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF.format(address=address, uuid=uuid))
            host.path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF)
            self.start(host)
        for host in self.hosts:
            self.wait(host)

    def version(self) -> str:
        """Return libvirt's version."""
        return self.hosts[0].exec(["virsh", "--version"]).stdout.strip()

    def start(self, host: LabHost) -> None:
        """Start libvirtd; its guests are taken up again."""
        host.exec(["sh", "-c", "rm -f /run/libvirtd.pid; exec libvirtd --daemon --listen"], timeout_s=START_S)

    def kill(self, host: LabHost) -> None:
        """End libvirtd as a crash would; its guests run on."""
        host.exec(["sh", "-c", "kill -9 $(cat /run/libvirtd.pid)"])

    def wait(self, host: LabHost) -> None:
        """Wait until libvirtd answers; HostError `bench-step` when it does not."""
        deadline_s = time.monotonic() + START_S
        while host.exec(["virsh", "-q", "list"], check=False).returncode:
            if time.monotonic() > deadline_s:
                raise HostError("bench-step", f"libvirtd on {host.name} does not answer")
            time.sleep(0.1)

    def _certify(self) -> None:
        """Give the hosts certificates of one authority."""
        out = "/root/pki"
        maker = self.hosts[0]
        scripts = [AUTHORITY.format(out=out)]
        for host in self.hosts:
            ips = ",".join(f"IP:{address}" for address in host.plan.addresses.values())
            scripts.append(CERTIFICATE.format(out=out, host=host.name, ips=ips))
        maker.exec(["sh", "-c", "\n".join(scripts)], timeout_s=START_S)
        made = maker.path(out)
        for host in self.hosts:
            for name, places in PLACES.items():
                content = (made / name.format(host=host.name)).read_bytes()
                for place in places:
                    path = host.path(place)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)

"""The scripts that make a machine a host or a storage server, run as an operator runs them, in copies of Debian 13."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmhv.lab.tree import cache_lock, ensure_trees, local_paths, pip_settings

pytestmark = pytest.mark.real

CHECKOUT = Path(__file__).resolve().parents[2]
NODES = ("null", "zero", "full", "random", "urandom", "tty")
# An overlay in memory on a tree, with the machine's network; all of it ends with its process.
MACHINE = """
set -eu
mount -t tmpfs machine "$2"
mkdir "$2/upper" "$2/inner" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/inner" overlay "$2/root"
root=$2/root
mount -t proc proc "$root/proc"
for node in $3; do touch "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"; done
for file in /etc/resolv.conf /etc/hosts; do rm -f "$root$file"; cat "$file" >"$root$file"; done
for path in $4; do
    if [ -d "$path" ]; then mkdir -p "$root$path"; else mkdir -p "$root${path%/*}"; touch "$root$path"; fi
    mount --bind "$path" "$root$path"
done
apt-config dump | grep -i '^Acquire::[a-z]*::Proxy' >"$root/etc/apt/apt.conf.d/99machine" || true
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/not-for-long"
mkdir -p "$root/srv/kvmhv-src"
mount --bind -o ro "$5" "$root/srv/kvmhv-src"
echo up
exec chroot "$root" /bin/bash
"""


class Machine:
    """A bare Debian 13 that commands can be given to."""

    def __init__(self, tree: Path, directory: Path) -> None:
        settings = pip_settings()
        paths = ["/etc/ssl/certs", *local_paths(settings)]
        arguments = [str(tree), str(directory), " ".join(NODES), " ".join(paths), str(CHECKOUT)]
        cage = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        self._process = subprocess.Popen(
            [*cage, "sh", "-c", MACHINE, "sh", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin", "HOME": "/root", **proxies, **settings},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "up\n"

    def run(self, command: str) -> str:
        """Return what a command said; it must succeed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f'( {command}\n) </dev/null\nstatus=$?; echo; echo "status $status"\n')
        self._process.stdin.flush()
        said = []
        for line in self._process.stdout:
            if line.startswith("status "):
                text = "".join(said).rstrip("\n")
                assert line == "status 0\n", text
                return text
            said.append(line)
        raise AssertionError("the machine is gone: " + "".join(said))

    def end(self) -> None:
        """End it, and with it all of its mounts."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Return a copy of the lab's Debian 13, without what the lab's own hosts have of kvmhv."""
    with cache_lock():
        tree = ensure_trees(["trixie"], print)["trixie"]
    found = Machine(tree, tmp_path)
    try:
        found.run("rm -rf /opt/kvmhv /usr/local/bin/kvmhv")
        yield found
    finally:
        found.end()


def test_a_bare_debian_becomes_a_host_once(machine: Machine) -> None:
    install = "/srv/kvmhv-src/packaging/install-host --name host7 --advertise host7:6600 --network 10.1.0.0/24"
    said = machine.run(install)
    assert "installing the program" in said
    assert "not booted with systemd" in said
    assert machine.run(install).splitlines()[-1] == "install-host: nothing to do"
    assert machine.run("kvmhv --version")
    machine.run("test -s /usr/local/share/man/man1/kvmhv.1; getent group kvmhv")
    assert 'name = "host7"' in machine.run("cat /etc/kvmhv/agent.toml")
    machine.run("mkdir -p /run/kvmhv; kvmhv agent >/var/log/agent 2>&1 & echo $! >/run/agent.pid")
    machine.run(
        "for i in $(seq 300); do [ ! -S /run/kvmhv/agent.sock ] || exit 0; sleep 0.2; done; cat /var/log/agent; exit 1"
    )
    assert "host7" in machine.run("kvmhv host show")
    # The operator's configuration stays, and what an older version left goes on until the new one is whole.
    machine.run("echo 'log_level = \"debug\"' >>/etc/kvmhv/agent.toml; kill $(cat /run/agent.pid)")
    machine.run(
        "mv /opt/kvmhv/versions/* /opt/kvmhv/versions/older; ln -sfn /opt/kvmhv/versions/older /opt/kvmhv/current"
    )
    machine.run(
        "PIP_NO_INDEX=1 PIP_FIND_LINKS=/nowhere " + install + " && exit 1; test -e /opt/kvmhv/current/bin/kvmhv"
    )
    assert "debug" in machine.run("cat /etc/kvmhv/agent.toml")


def test_a_bare_debian_becomes_a_storage_server_once(machine: Machine) -> None:
    machine.run("echo a-password >/root/password")
    install = "/srv/kvmhv-src/packaging/install-storage --network 10.1.0.0/24 --password-file /root/password"
    assert "set the password" in machine.run(install)
    assert machine.run(install).splitlines()[-1] == "install-storage: nothing to do"
    shares = machine.run("testparm -s 2>/dev/null")
    assert "[vms]" in shares
    assert "smb encrypt = required" in shares
    assert "kvmhv:" in machine.run("pdbedit -L 2>/dev/null")
    assert machine.run("cat /etc/exports.d/kvmhv.exports").startswith("/srv/kvmhv/nfs 10.1.0.0/24(")
    assert "a-password" not in machine.run("cat /var/log/kvmhv-install.log /etc/samba/*.conf")

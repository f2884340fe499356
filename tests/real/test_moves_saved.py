"""What need not be sent is not sent, the report says so, and the disks are the same at the target."""

import pytest

from tests.real.moving import MIB, Pair, Side

pytestmark = pytest.mark.real

DISKS = "/var/lib/kvmhv/disks/web01"


def digests(side: Side, *names: str) -> list[str]:
    """Return a digest of what a guest reads of each image."""
    whole = "qemu-img convert -U -O raw {0} /srv/look.raw && sha256sum < /srv/look.raw && rm /srv/look.raw"
    return [side.sh(f"mkdir -p /srv && {whole.format(f'{DISKS}/{name}')}").split()[0] for name in names]


def stored(side: Side, name: str) -> int:
    """Return the bytes that an image takes on its host."""
    return side.file(f"{DISKS}/{name}").stat().st_blocks * 512


def test_zeros_and_what_is_not_stored_stay_at_the_source(pair: Pair) -> None:
    """A raw image with written zeros, a sparse one, a qcow2 with zero clusters, written zeros and a discard."""
    pair.a.sh(
        "mkdir -p /srv; cd /srv; head -c 24M /dev/zero > zeros.raw; head -c 4M /dev/urandom >> zeros.raw;"
        "truncate -s 64M sparse.raw; head -c 4M /dev/urandom | dd of=sparse.raw conv=notrunc bs=1M seek=30 status=none;"
        "qemu-img create -q -f qcow2 mixed.qcow2 64M;"
        "head -c 4M /dev/urandom > data; qemu-io -d unmap -c 'write -s data 8M 4M' -c 'write -s data 40M 4M'"
        " -c 'write -z 16M 8M' -c 'write -P 0 24M 8M' -c 'discard 40M 2M' mixed.qcow2 > /dev/null; rm data"
    )
    files = ("zeros.raw,format=raw", "sparse.raw,format=raw", "mixed.qcow2")
    pair.boot(*(word for file in files for word in ("--disk", f"file=/srv/{file}")))
    images = ("disk1.raw", "disk2.raw", "disk3.qcow2")
    before, was = digests(pair.a, *images), {name: stored(pair.a, name) for name in images}

    report = pair.moved(pair.a, pair.b)
    pair.works(pair.b)
    assert digests(pair.b, *images) == before
    found = {saving["disk"]: saving for saving in report["savings"]}
    assert list(found) == ["disk0", "disk1", "disk2", "disk3"]
    data = {"disk1": 4 * MIB, "disk2": 4 * MIB, "disk3": 6 * MIB}
    for disk, data_bytes in data.items():
        assert data_bytes <= found[disk]["sent_bytes"] < data_bytes * 1.05 + MIB / 4, found
    assert found["disk1"]["zero_bytes"] > 23.5 * MIB, found
    assert found["disk1"]["unallocated_bytes"] < MIB, found
    assert found["disk2"]["unallocated_bytes"] > 59 * MIB, found
    assert found["disk2"]["zero_bytes"] == 0, found
    assert found["disk3"]["zero_bytes"] > 7.5 * MIB, found
    assert found["disk3"]["unallocated_bytes"] > 48 * MIB, found
    for name, data_bytes in zip(images, data.values(), strict=True):
        assert stored(pair.b, name) <= min(was[name], data_bytes + MIB), (name, was, stored(pair.b, name))
    assert report["wire_bytes"] < report["memory_bytes"] * 1.1 + sum(one["sent_bytes"] for one in found.values()) + MIB

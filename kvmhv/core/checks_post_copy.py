"""Can pages follow the guest (post-copy), where that was asked for?"""

from collections.abc import Iterator

from kvmhv.model import Finding, Inventory, MoveRequest, Severity, Vm

PLAIN = "tcpip"


def findings(vm: Vm, request: MoveRequest, source: Inventory, target: Inventory) -> Iterator[Finding]:
    """Return why not, and the risk; nothing where it was not asked for."""
    if not request.post_copy:
        return
    if vm.runtime:
        yield _impossible(
            vm.name, source.host, f"{vm.runtime} moves {vm.name} by its own rules", "leave --post-copy out"
        )
        return
    for host in (source, target):
        if not host.qemu.post_copy:
            has = f"QEMU {host.qemu.version_text}, kvmhv {host.kvmhv_version}"
            why = f"{has} or the kernel (userfaultfd) of {host.host} cannot do it"
            yield _impossible("post-copy", host.host, why, "leave --post-copy out")
    if request.performance not in (None, PLAIN):
        why = f"pages that follow travel over one connection, not with --performance {request.performance}"
        yield _impossible("post-copy", source.host, why, "say --performance tcpip, or leave --post-copy out")
    yield Finding(
        id="post-copy-risk",
        severity=Severity.WARNING,
        object="post-copy",
        host=target.host,
        text=f"if {vm.name} still dirties too much at the end of the passes, it runs on {target.host} before all its "
        f"memory is there; if {source.host}, {target.host} or a QEMU of theirs is lost then, what it had in memory is "
        "lost (its disks lose nothing)",
        todo="leave --post-copy out if it must not lose that",
    )


def _impossible(about: str, host: str, why: str, todo: str) -> Finding:
    text = f"{why}: the guest cannot run before all its pages have arrived"
    return Finding(id="post-copy-impossible", severity=Severity.ERROR, object=about, host=host, text=text, todo=todo)

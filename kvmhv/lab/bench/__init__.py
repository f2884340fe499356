"""The benchmark: QEMU driven by hand, virsh and kvmhv move the same guests over the same link, in turn.

`script/bench` runs it. Rooms: cases (what is compared, pure), raw, libvirt and product (the three ways to move a
guest), meters (what a move costs, seen from outside), run (the turns), figures (ratios and targets, pure), page (HTML).
"""

"""What an operator gets when something dies, hangs or is cut off in the middle of a move: the promises, in one table.

    stays     the VM goes on at the source in the same process; the move has failed, and nothing is left at the target
    moves     the VM goes on at the target where it stopped at the source; the move is done
    off-src   the VM is off at the source, with every write that was acknowledged on its disks: start it
    off-tgt   the VM is off at the target, with every write that was acknowledged on its disks: start it
    operator  nobody can prove whether it ran at the target: both copies stand still until `kvmhv move resolve`
    -         there is nothing of that kind to break in that phase

In every cell: it never runs twice; both agents say the same of the move, also after a restart; the VM can be moved
again; nothing else is left on either host. The phases are those of stage.PHASES, the faults those of faults.FAULTS.
"""

TABLE = """
                      setup    storage  early    last     pre-     device   sent     granted  before   runs     clean-
                                        passes   pass     switch-  state                      run               up
                                                          over
source agent killed   stays    stays    stays    stays    stays    stays    stays    moves    moves    moves    moves
target agent killed   stays    moves    moves    moves    moves    moves    moves    moves    moves    moves    moves
both agents killed    stays    stays    stays    stays    stays    stays    stays    moves    moves    moves    moves
source QEMU killed    off-src  off-src  off-src  off-src  off-src  moves    moves    moves    moves    moves    moves
target QEMU killed    stays    stays    stays    stays    stays    stays    stays    stays    off-tgt  off-tgt  off-tgt
source host off       off-src  off-src  off-src  off-src  off-src  off-src  moves    moves    moves    moves    moves
target host off       stays    stays    stays    stays    stays    stays    operator operator operator operator off-tgt
"""

NAME = 22
FATES = ("stays", "moves", "off-src", "off-tgt", "operator", "-")


def promises(phases: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Return the fate of a VM by fault and phase."""
    found: dict[str, dict[str, str]] = {}
    for line in TABLE.splitlines():
        words = line[NAME:].split()
        if line[:1].strip() and words:
            assert len(words) == len(phases) and set(words) <= set(FATES), line
            found[line[:NAME].strip()] = dict(zip(phases, words, strict=True))
    return found

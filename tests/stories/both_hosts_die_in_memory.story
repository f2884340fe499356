# Both hosts lose their power while the guest runs at the source, long before the switchover: nothing was announced, so the source knows.

begin used=68719476736
----
source enquiring/holds

source started
----
enquiring/holds: journal on disk, timer step 20 s

source peer-connected
----
enquiring/holds: no timer peer, say Enquire

deliver
----
target answers with its inventory
source hears Answer
  offering/holds: journal on disk, timer step 120 s, say Offer
target lets the offer in
  preparing/accepts: journal on disk, timer step 120 s, Prepare

target incoming-ready
----
waiting/accepts: journal on disk, timer step 216000 s, say Ready

deliver
----
source hears Ready
  storage/holds: journal on disk, timer step 172800 s, timer idle 120 s, MirrorDisks

source mirrors-ready
----
memory/holds: journal on disk, timer step 43200 s, timer idle 60 s, SendMemory

source pass-started number=1 remaining_bytes=67108864 total_bytes=67108864
----
memory/holds: timer idle 60 s

restart target process=no rebooted=yes
----
standing/accepts: journal on disk, NEEDS THE OPERATOR (target-cannot-tell)

restart source process=no rebooted=yes
----
undoing/holds: journal on disk, timer step 60 s, no timer idle, no timer peer, UndoSource, say Abort

source peer-connected
----
undoing/holds: no timer peer, say Abort

deliver
----
target hears Abort
  undoing/refused: journal on disk, timer step 60 s, no timer peer, UndoTarget
target hears Abort
  undoing/refused: nothing

target undone
----
ended/refused: say Refused, END failed (qemu-gone)

deliver
----
source hears Refused
  ended/holds: END failed (qemu-gone)

source failed effect=UndoSource
----
ended/holds: nothing

deliver
----
nothing was said

# The same, but QEMU had stopped the guest by itself, so it may have let it go on by itself: refused.

begin
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
memory/holds: journal on disk, timer idle 60 s

source pre-switchover at_ms=90
----
stopping/holds: FinishMirrors, no timer idle, timer step 30 s

source mirrors-finished
----
switching/holds: ContinueSwitchover, say MirrorsEnded(held=false)

deliver
----
target hears MirrorsEnded
  waiting/accepts: Unexport, journal in memory

target unexported
----
waiting/accepts: nothing

target memory-sent
----
waiting/accepts: nothing

lose
----
lost: 

restart source process=no rebooted=yes
----
granted/granted: journal in memory, say Grant(sent=false ran=false), journal on disk, timer step 15 s

source peer-connected
----
granted/granted: no timer peer, journal in memory, say Grant(sent=false ran=false)

deliver
----
target hears Grant
  undoing/refused: journal on disk, timer step 60 s, no timer peer, UndoTarget
target hears Grant
  undoing/refused: nothing

target undone
----
ended/refused: say Refused, END failed (source-lost)

deliver
----
source hears Refused
  undoing/holds-again: journal on disk, timer step 60 s, no timer idle, no timer peer, UndoSource, say Abort
target hears Abort
  ended/refused: nothing

source failed effect=UndoSource
----
ended/holds-again: END failed (source-lost)

deliver
----
nothing was said

# The source's agent dies in the switchover: its successor takes the move back, on disk before the guest goes on.

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

source pass-started number=2 remaining_bytes=1000 at_ms=90
----
stopping/holds: StopGuest, no timer idle, timer step 30 s

source guest-stopped told_ms=100 at_ms=103
----
stopping/holds: FinishMirrors

source mirrors-finished
----
stopping/holds: say MirrorsEnded(held=false)

source pre-switchover at_ms=120
----
switching/holds: ContinueSwitchover, say MirrorsEnded(held=true)

deliver
----
target hears MirrorsEnded
  waiting/accepts: Unexport, journal in memory
target hears MirrorsEnded
  waiting/accepts: journal in memory

target unexported
----
waiting/accepts: nothing

target memory-sent
----
waiting/accepts: nothing

restart source status=paused migration=completed
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

source undone
----
undoing/holds: Cont

source guest-runs
----
undoing/holds: nothing

target undone
----
ended/refused: say Refused, END failed (agent-restarted)

deliver
----
source hears Refused
  ended/holds: END failed (agent-restarted)

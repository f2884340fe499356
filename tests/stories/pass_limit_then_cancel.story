# The limit of passes: at the start of pass 4 three are complete.

begin passes=3 disks=0
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
  memory/holds: journal on disk, timer step 43200 s, timer idle 60 s, SendMemory

source pass-started number=1 remaining_bytes=67108864 total_bytes=67108864
----
memory/holds: journal on disk, timer idle 60 s

source pass-started number=2 remaining_bytes=60000000 at_ms=1000
----
memory/holds: timer idle 60 s

source pass-started number=3 remaining_bytes=60000000 at_ms=2000
----
memory/holds: timer idle 60 s

source pass-started number=4 remaining_bytes=60000000 at_ms=3000
----
stopping/holds: StopGuest, no timer idle, timer step 30 s

# A cancel in the last pass still works: nothing is granted.
source cancel-requested
----
undoing/holds: journal on disk, timer step 60 s, no timer idle, no timer peer, UndoSource, say Abort

deliver
----
target hears Abort
  undoing/refused: journal on disk, timer step 60 s, no timer peer, UndoTarget

source undone
----
undoing/holds: Cont

target undone
----
ended/refused: say Refused, END cancelled (cancelled)

source guest-runs
----
undoing/holds: nothing

deliver
----
source hears Refused
  ended/holds: END cancelled (cancelled)

# Both hosts lose their power in the switchover, and the disks are shared: nothing is at stake, the target has it.

begin disks=0
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

source pass-started number=2 remaining_bytes=1000 at_ms=90
----
stopping/holds: StopGuest, no timer idle, timer step 30 s

source guest-stopped told_ms=100 at_ms=103
----
stopping/holds: nothing

source pre-switchover at_ms=120
----
switching/holds: ContinueSwitchover, say MirrorsEnded(held=true)

deliver
----
target hears MirrorsEnded
  waiting/accepts: journal in memory

target memory-sent
----
waiting/accepts: nothing

source memory-sent
----
granted/granted: journal in memory, say Grant(sent=true ran=false), timer step 15 s

lose
----
lost: Grant

restart target process=no rebooted=yes
----
standing/accepts: journal on disk, NEEDS THE OPERATOR (target-cannot-tell)

restart source process=no rebooted=yes
----
granted/granted: journal in memory, say Grant(sent=false ran=false), journal on disk, timer step 15 s

target peer-connected
----
standing/accepts: no timer peer, say Unknown

source peer-connected
----
granted/granted: no timer peer, journal in memory, say Grant(sent=false ran=false)

deliver
----
target hears Grant
  settling/owns: journal on disk, Adopt, timer step 60 s
source hears Unknown
  granted/granted: NEEDS THE OPERATOR (target-cannot-tell)
target hears Grant
  settling/owns: nothing

target adopted
----
settling/owns: journal on disk, timer step 90 s, say Owned

deliver
----
source hears Owned
  cleanup/yielded: journal on disk, timer step 60 s, EndCopy, say Grant(sent=true ran=true)
target hears Grant
  settling/owns: say Owned
source hears Owned
  cleanup/yielded: nothing

source copy-ended
----
cleanup/yielded: RemoveCopy

source copy-removed
----
ended/yielded: say Finished, END done

deliver
----
target hears Finished
  ended/owns: END done

# Running is lost with the connection: the source stands still, asks again, and ends its copy on proof.

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

source memory-sent
----
granted/granted: journal in memory, say Grant(sent=true ran=false), timer step 15 s

deliver
----
target hears Grant
  starting/owns: journal in memory, Cont, timer step 15 s

target guest-runs
----
settling/owns: say Running, Adopt, timer step 60 s

lose
----
lost: Running

source peer-lost
----
granted/granted: nothing

source timer-fired
----
granted/granted: NEEDS THE OPERATOR (handover-unknown)

# Too late to cancel.
source cancel-requested
----
granted/granted: nothing

target peer-lost
----
settling/owns: nothing

target adopted
----
settling/owns: journal on disk, timer step 90 s, say Owned

lose
----
lost: Owned

source peer-connected
----
granted/granted: no timer peer, say MirrorsEnded(held=true), journal in memory, say Grant(sent=true ran=false)

target peer-connected
----
settling/owns: no timer peer, say Running, say Owned

deliver
----
target hears MirrorsEnded
  settling/owns: nothing
target hears Grant
  settling/owns: say Running, say Owned
source hears Running
  cleanup/yielded: journal on disk, timer step 60 s, EndCopy, say Grant(sent=true ran=true)
source hears Owned
  cleanup/yielded: nothing
source hears Running
  cleanup/yielded: nothing
source hears Owned
  cleanup/yielded: nothing
target hears Grant
  settling/owns: say Running, say Owned
source hears Running
  cleanup/yielded: nothing
source hears Owned
  cleanup/yielded: nothing

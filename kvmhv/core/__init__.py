"""Pure decisions: `step(state, fact) -> (state, [effects])`. No I/O, no clock, no randomness, no logging.

facts.py and effects.py are the vocabulary, source.py and target.py the two machines, handover.py the one rule that must
never be wrong, checks.py and plan.py what setup decides, precopy.py when the guest is stopped, recover.py what a new
agent makes of an old journal, report.py what a person sees.
"""

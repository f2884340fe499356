"""The command line: it knows the agent's HTTP interface and the model, nothing else.

`main.py` loads one file a verb group when it is asked for, because a command has to answer at once: nothing here
imports more than click, msgspec and the standard library until something has to be drawn.
"""

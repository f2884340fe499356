"""The protocol between two agents, without I/O: frames in, events out; what is to be sent is asked for."""

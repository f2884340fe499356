"""The edge: one outside thing each, unaware of each other; they implement the Protocols of kvmhv/ports.py."""

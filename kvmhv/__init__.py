"""kvmhv: a running VM moves between Linux hosts under Hyper-V's rules, and every phase is measured."""

__version__ = "0.1.0"

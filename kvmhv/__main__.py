"""`python -m kvmhv` is `kvmhv`."""

from kvmhv.cli.main import run

if __name__ == "__main__":
    run()

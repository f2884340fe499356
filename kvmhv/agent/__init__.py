"""The program that runs on a host: its parts (`assembly`), the one loop (`runner`), moves, VMs, the API."""

"""The REST API (v1), the peer routes, /metrics and /openapi.json, from one table of routes (`routes.py`)."""

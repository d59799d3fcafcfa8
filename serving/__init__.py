"""The parts of the HTTP server of `classify_api.py`; docs/SERVING.md says how to run it."""

"""The HTTP door: an OpenAI-compatible server over `AsyncClient`. Run as `python -m gmanager.gateway`."""

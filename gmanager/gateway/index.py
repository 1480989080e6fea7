"""What the gateway says of itself: its routes, as JSON and as a page that fetches nothing."""

import html

from fastapi import FastAPI
from fastapi.routing import APIRoute

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>distattn</title>
<style>body {{ font: 16px/1.5 sans-serif; margin: 2em }} td {{ padding: 0 1.5em 0 0; vertical-align: top }}</style>
<h1>distattn</h1>
<p>OpenAI's API, and Anthropic's messages, over a running service. All fields: <a href="openapi.json">openapi.json</a>.</p>
<table>{rows}</table>
</html>
"""

Entry = dict[str, str]


def list_routes(app: FastAPI) -> list[Entry]:
    """Method, path and purpose of each route."""
    return [
        {"method": method, "path": route.path, "purpose": (route.description or "").partition("\n")[0]}
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
    ]


def page(routes: list[Entry]) -> str:
    """The same for people."""
    rows = (
        f"<tr><td>{html.escape(r['method'])}<td><code>{html.escape(r['path'])}</code><td>{html.escape(r['purpose'])}"
        for r in routes
    )
    return _PAGE.format(rows="\n".join(rows))

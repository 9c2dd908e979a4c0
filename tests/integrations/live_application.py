"""The example with a page that a test can look at: `uvicorn live_application:app`.

A browser prints a page when it has loaded. So an image is added to it that is only answered when the page
has shown what a test waits for.
"""

from __future__ import annotations

import asyncio

from fastapi import Response
from fastapi.responses import HTMLResponse
from machines import COLLECTIONS, PAGE, create_app

from hf_async_store import open_store

WATCHING = """
<img src="/test/image" alt="">
<script>
  new MutationObserver(() => {
    if (document.body.innerText.includes("live")) fetch("/test/live");
    if (document.body.innerText.includes("DONE")) fetch("/test/shown");
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
</script>
"""

app = create_app(lambda: open_store("memory:", collections=COLLECTIONS))
live, shown = asyncio.Event(), asyncio.Event()


@app.get("/test/page/{request_id}/live")
async def page(request_id: str) -> Response:
    text = PAGE.read_text("utf-8").replace(
        'location.pathname.replace(/\\/live$/, "")', f'"/requests/{request_id}"'
    )
    return HTMLResponse(text + WATCHING)


@app.get("/test/image")
async def image() -> None:
    await shown.wait()


@app.get("/test/live")
async def is_live() -> None:
    live.set()


@app.get("/test/shown")
async def is_shown() -> None:
    shown.set()


@app.get("/test/wait")
async def wait_until_live() -> None:
    await live.wait()

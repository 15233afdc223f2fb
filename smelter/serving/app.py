"""The application: routes, page, and what stands before them."""

from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from smelter import __version__
from smelter.serving import about_routes, llama_routes, openai_routes
from smelter.serving.bridge import Service
from smelter.serving.errors import ApiError, install_handlers
from smelter.serving.gate import Gate, Rules
from smelter.serving.schema import ERRORS, Health

MEDIA = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
PAGES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/docs": "docs.html", "/docs.js": "docs.js"}


def page_router() -> APIRouter:
    """The page and its parts, from the package: nothing is fetched from elsewhere."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("smelter.serving") / "page"

    def add(path: str, name: str) -> None:
        content = (folder / name).read_bytes()

        @router.get(path)
        async def page() -> Response:
            return Response(content, media_type=MEDIA[name.rpartition(".")[2]])

    for path, name in PAGES.items():
        add(path, name)
    return router


class AsJson:
    """ASGI middleware that takes every body for JSON, whatever its Content-Type says.

    Plug-ins and `curl -d` send others or none. FastAPI's reason for asking for it is that a page of another site can
    send a form; here `gate` turns such pages away by their Origin.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] == "http" and scope["method"] == "POST":
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        await self.app(scope, receive, send)


def new_app() -> FastAPI:
    """An app with our errors and without FastAPI's pages, which load from elsewhere."""
    app = FastAPI(
        title="smelter serve",
        version=__version__,
        description="A code model behind OpenAI's and llama.cpp's interfaces.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    install_handlers(app)
    app.add_middleware(AsJson)
    app.include_router(page_router())
    return app


def make_app(service: Service, rules: Rules) -> ASGIApp:
    """Everything behind one callable."""
    app = new_app()
    app.include_router(openai_routes.make_router(service))
    app.include_router(llama_routes.make_router(service))
    app.include_router(about_routes.make_router(service))

    @app.get("/v1/health", responses={500: ERRORS[500]})
    @app.get("/health", responses={500: ERRORS[500]})
    async def health() -> Health:
        """Whether the engine works, and how much it has to do."""
        engine = service.engine
        if engine.failure is not None:
            raise ApiError(500, f"the engine failed: {engine.failure}")
        return Health(status="ok", active=engine.num_active, slots=engine.num_slots, waiting=engine.num_waiting)

    @app.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Any:
        """Figures for Prometheus."""
        return Response(service.stats.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Gate(app, rules, service.stats)

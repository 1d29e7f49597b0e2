"""`/docs`: Swagger UI over /openapi.json, from files that were installed with the server. Nothing comes from elsewhere.

All addresses are relative, so that the page works below any prefix.
"""

from importlib import resources

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

_PACKAGE = "fastapi_offline"  # it carries the files of swagger-ui-dist
_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_START = b"""\
window.ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,  // that would show the document to a server elsewhere
});
"""
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Octavo</title>
<link rel="icon" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_HEADERS = {
    # The browser is told to fetch nothing from anywhere else. Swagger UI writes styles into its elements.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
}
_KEEP_HEADERS = {"cache-control": "max-age=3600", "x-content-type-options": "nosniff"}


def docs_routes() -> APIRouter:
    """The page and its files. None of them is an endpoint of the API."""
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def docs() -> Response:
        """The page."""
        return HTMLResponse(_PAGE, headers=_HEADERS)

    @router.get("/docs/start.js")
    async def start() -> Response:
        """What the page does first."""
        return Response(_START, headers=_KEEP_HEADERS, media_type="text/javascript")

    @router.get("/docs/{name}")
    def file(name: str) -> Response:
        """One of Swagger UI's files. (Not async: it is read from disk.)"""
        if name not in _TYPES:
            raise HTTPException(404, "Not Found")
        body = resources.files(_PACKAGE).joinpath("static", name).read_bytes()
        return Response(body, headers=_KEEP_HEADERS, media_type=_TYPES[name])

    return router

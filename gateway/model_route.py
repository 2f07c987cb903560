"""``GET /v1/models/{id}``, which OpenAI documents and vLLM's server lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse

from llmserve.gateway.errors import error_response

if TYPE_CHECKING:
    from fastapi import FastAPI


def install_model_route(app: FastAPI) -> None:
    """Add the route; ids may contain slashes."""

    async def show_model(request: Request) -> JSONResponse:
        wanted = request.path_params["model_id"]
        listed = await request.app.state.openai_serving_models.show_available_models()
        for card in listed.data:
            if card.id == wanted:
                return JSONResponse(card.model_dump())
        return error_response(404, "NotFoundError", f"The model `{wanted}` does not exist.", param="model")

    app.add_route("/v1/models/{model_id:path}", show_model, methods=["GET"])

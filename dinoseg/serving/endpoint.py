"""The HTTP endpoint: POST /segment, GET /health, GET /metrics; errors are JSON."""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan

from dinoseg.serving.answers import encoder, wanted_format
from dinoseg.serving.guard import Guard, Hosts
from dinoseg.serving.limits import HungUp, Refused
from dinoseg.serving.service import Service

logger = logging.getLogger(__name__)
Answer = Callable[[Request], Awaitable[Response]]
_GONE = 499  # nginx's status for a disconnected client: only the metrics see it


def endpoint(
    service: Service, hosts: Hosts, further: Sequence[BaseRoute] = (), lifespan: Lifespan | None = None
) -> Starlette:
    """Return the endpoint as an ASGI application.

    Args:
        service: the model and its limits.
        hosts: accepted host names.
        further: additional routes, matched first.
        lifespan: background tasks of the application.
    """
    routes = [
        Route("/segment", counted(service, partial(_segment, service)), methods=["POST"]),
        Route("/health", partial(_health, service)),
        Route("/metrics", partial(_metrics, service)),
        Route("/", _index),
    ]
    return Starlette(
        routes=[*further, *routes],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={
            Refused: refusal_response,
            HungUp: _hung_up_response,
            HTTPException: _http_error_response,
            Exception: _failure_response,
        },
        lifespan=lifespan,
    )


def refusal_response(request: Request, error: Exception) -> Response:
    """Return the JSON response of a refused request: the rule's name and a sentence."""
    assert isinstance(error, Refused)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse({"error": {"rule": error.rule, "message": error.message}}, error.status, headers)


def counted(service: Service, answer: Answer) -> Answer:
    """Wrap a handler of mask requests, so that the metrics count each of them, whatever its outcome."""

    async def counting(request: Request) -> Response:
        start = time.perf_counter()
        try:
            answered = await _mask_or_why(answer, request)
        except Refused as error:
            service.metrics.refused(error.rule)
            answered = refusal_response(request, error)
        except HungUp as error:
            service.metrics.refused("hung_up")
            answered = _hung_up_response(request, error)
        service.metrics.answered(answered.status_code, time.perf_counter() - start)
        return answered

    return counting


async def _mask_or_why(answer: Answer, request: Request) -> Response:
    """Return the handler's response; turn every failure into `Refused` or `HungUp`."""
    try:
        return await answer(request)
    except (Refused, HungUp):
        raise
    except Exception as error:
        logger.exception("An image could not be segmented")
        raise Refused(500, "model", "The model failed on this image; see the server's log.") from error


async def _segment(service: Service, request: Request) -> Response:
    return await service.segment(request, encoder(wanted_format(request), service.model.facts))


async def _index(request: Request) -> Response:
    return PlainTextResponse("POST /segment an image; GET /health, /metrics. How: docs/serving.md of dinoseg.\n")


async def _health(service: Service, request: Request) -> Response:
    facts = service.model.facts
    status = "stopping" if service.stopping else "ok"
    classes = [
        {"id": label, "name": name, "colour": list(colour)}
        for label, (name, colour) in enumerate(zip(facts.classes, facts.palette, strict=True))
    ]
    return JSONResponse({"status": status, "classes": classes}, 503 if service.stopping else 200)


async def _metrics(service: Service, request: Request) -> Response:
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _hung_up_response(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)


def _http_error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = Refused(error.status_code, "http", error.detail)
    answer = refusal_response(request, refused)
    answer.headers.update(error.headers or {})
    return answer


def _failure_response(request: Request, error: Exception) -> Response:
    return refusal_response(request, Refused(500, "server", "The server failed on this request; see its log."))

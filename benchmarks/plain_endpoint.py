"""The endpoint that one writes oneself in 40 lines, with which serve.py compares: a global model and a pool of threads.

Usage: python benchmarks/plain_endpoint.py RUN_FOLDER PORT
"""

import io
import sys

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import dinoseg

model = dinoseg.load(sys.argv[1], device="cpu")


def answer(data):
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    mask = Image.fromarray(model.predict(image).mask)
    mask.putpalette([level for colour in model.palette for level in colour])
    file = io.BytesIO()
    mask.save(file, "PNG", compress_level=1)
    return Response(file.getvalue(), media_type="image/png")


async def segment(request: Request):
    return await run_in_threadpool(answer, await request.body())


if __name__ == "__main__":
    app = Starlette(routes=[Route("/segment", segment, methods=["POST"])])
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)

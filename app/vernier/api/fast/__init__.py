"""Predictions without the ASGI cycle, on the same port.

    bytes → head (cached) → body → envelope, inputs → scheduler → answer → bytes

The protocol recognizes a plain `POST /v1/predict` whose head came in one piece and whose length is
known. Whatever is out of the ordinary (chunks, Expect, HTTP/1.0, a body over the limit, a missing key, another
route) it leaves to uvicorn's protocol below it and so to FastAPI, byte for byte as it came. Decoders,
checks, errors and answers are those of the ordinary path.
"""

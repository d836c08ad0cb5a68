"""Pixels on the pipe: raw bytes after their result's message, read into memory one picture at a time.

Pickled with it they would be in memory twice, and a reader out of memory would lose its position in the stream.
"""

import os
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from inference.errors import ResultTooLarge
from inference.process.protocol import Failed, Finished
from inference.request import GenerationResult, RawImage

CHUNK_BYTES = 1 << 16


def send_finished(connection: "Connection[Any, Any]", request_id: str, result: GenerationResult) -> None:
    """Send the result, then its pixels."""
    pixels = [image.rgb for image in result.images]
    bare = tuple(replace(image, rgb=b"") for image in result.images)
    connection.send(Finished(request_id, replace(result, images=bare), tuple(map(len, pixels))))
    for rgb in pixels:
        view = memoryview(rgb)
        while view:
            view = view[os.write(connection.fileno(), view) :]


def receive_pixels(connection: "Connection[Any, Any]", message: Finished) -> Finished | Failed:
    """Read the pixels after `message`; return `ResultTooLarge` as the answer where there is no memory for them.

    Raises `OSError` or `EOFError` where the sender is gone.
    """
    images: list[RawImage] = []
    left = sum(message.num_bytes)
    try:
        for image, num_bytes in zip(message.result.images, message.num_bytes, strict=True):
            buffer = bytearray(num_bytes)
            _fill(connection.fileno(), memoryview(buffer))
            left -= num_bytes
            images.append(replace(image, rgb=bytes(buffer)))
    except MemoryError:
        images.clear()
        # The rest is read all the same, or the position in the stream would be lost.
        while left:
            chunk = os.read(connection.fileno(), min(CHUNK_BYTES, left))
            if not chunk:
                raise EOFError("the pipe ended within a picture") from None
            left -= len(chunk)
        first, count = message.result.images[0], len(message.result.images)
        drawn = f"{count} picture{'s' if count > 1 else ''} of {first.width}x{first.height} px"
        reason = f"{drawn} were drawn, and the worker has no memory for them: ask for fewer or smaller ones"
        return Failed(message.request_id, ResultTooLarge(reason))
    return replace(message, result=replace(message.result, images=tuple(images)))


def _fill(descriptor: int, view: memoryview) -> None:
    while view:
        num_bytes = os.readv(descriptor, [view])
        if num_bytes == 0:
            raise EOFError("the pipe ended within a picture")
        view = view[num_bytes:]

"""Images in requests: data URLs, and addresses where the server may fetch them, as what the model takes.

Every image is decoded, and made as small as the model takes it, before the next one is: memory does not grow with their
number. One thread does that for all requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from common.errors import UserError
from data_pipeline.images import MAX_BYTES, BadImage, open_data_url, open_image
from inference.generator import Images
from inference.vision import ImageProcessor
from serving import protocol
from serving.http import ApiError

MAX_IMAGES = 16  # of a request
MAX_IMAGE_BODY = 32_000_000  # bytes of a request that may have images
FETCH_SECONDS = 10.0  # for an image, redirects included
MAX_REDIRECTS = 3
FETCHES = 4  # at a time


@dataclass(frozen=True)
class ImageReader:
    """Read the images of requests for one model. `allow_urls`: fetch them from public addresses, too."""

    prepare: ImageProcessor
    allow_urls: bool = False
    _decoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "images"))
    _fetching: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(FETCHES, "fetching"))

    @property
    def image_ids(self) -> tuple[int, ...]:
        return self.prepare.model.vision.image_ids

    async def read(self, messages: Sequence[protocol.Message], n: int) -> Images | None:
        """Return the last `n` images of a chat: those of turns that were left out of the prompt are the first ones.

        Raises ApiError, which names the part that cannot be used.
        """
        sources = [
            (part.source, f"messages[{i}].content[{j}].{part.type}")
            for i, message in enumerate(messages)
            for j, part in enumerate(message.content if isinstance(message.content, list) else [])
            if isinstance(part, protocol.ImagePart | protocol.InputImagePart)
        ]
        if len(sources) > MAX_IMAGES:
            raise ApiError(400, f"the request has {len(sources)} images; the limit is {MAX_IMAGES}", "messages")
        shown = sources[max(len(sources) - n, 0) :]
        return Images(**Images.join([await self._read(*source) for source in shown])) if shown else None

    async def _read(self, source: str, param: str) -> Images:
        loop = asyncio.get_running_loop()
        try:
            data: bytes | str = source
            if not source.startswith("data:"):
                if not self.allow_urls:
                    raise BadImage("only data URLs are read (data:image/png;base64,...): this server fetches no images")
                data = await loop.run_in_executor(self._fetching, fetch_image, source)
            return await loop.run_in_executor(self._decoding, functools.partial(self._decode, data))
        except UserError as error:
            raise ApiError(400, f"{param}: {error}", param, "invalid_image") from error

    def _decode(self, data: bytes | str) -> Images:
        images = self.prepare([open_data_url(data) if isinstance(data, str) else open_image(data)])
        assert images is not None
        return images


# ---- addresses


def fetch_image(url: str) -> bytes:
    """Return what is at an http(s) address. Raises BadImage.

    The name of the host is resolved once, and only public addresses are connected to, also after a redirect: with this
    server's help nobody shall see what only machines of its own network can.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        data, target = _get(url, deadline)
        if target is None:
            return data
        url = urllib.parse.urljoin(url, target)
    raise BadImage(f"{url:.80}: more than {MAX_REDIRECTS} redirects")


def _get(url: str, deadline: float) -> tuple[bytes, str | None]:
    """Return the content at an address, or where it redirects to."""
    shown = f"{url:.80}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise BadImage(f"{shown} is not an address") from None
    if parts.scheme not in ("http", "https") or not host:
        raise BadImage(f"{shown} is neither a data URL nor an http or https address")
    try:
        with _connect(host, port or {"http": 80, "https": 443}[parts.scheme], deadline) as plain:
            connection = http.client.HTTPConnection(parts.netloc.rpartition("@")[2])
            connection.sock = plain
            # Whatever the other side does, this ends it: timeouts of a socket count from the last byte.
            end = threading.Timer(max(deadline - time.monotonic(), 0), functools.partial(_end, connection))
            end.daemon = True
            end.start()
            try:
                if parts.scheme == "https":
                    context = ssl.create_default_context()
                    # Its socket takes the place of the plain one before anything is sent: `_end` must find it.
                    connection.sock = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
                    connection.sock.do_handshake()
                path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
                connection.request("GET", path, headers={"User-Agent": "minimind", "Accept": "image/*"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308) and (target := answer.headers.get("Location")):
                    return b"", target
                if answer.status != 200:
                    raise BadImage(f"{shown} answers {answer.status}")
                data = answer.read(MAX_BYTES + 1)
            finally:
                end.cancel()
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"{shown} cannot be fetched within {FETCH_SECONDS:g} s ({error})") from None
    if len(data) > MAX_BYTES:
        raise BadImage(f"{shown} is larger than {MAX_BYTES >> 20} MB")
    return data, None


def _end(connection: http.client.HTTPConnection) -> None:
    """End a connection; a read that waits in another thread ends, too."""
    sock = connection.sock
    if sock is not None:  # not closed meanwhile
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """Return a connection to a host, if all its addresses are public ones."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for _, _, _, _, address in found:
        if not is_public(str(address[0])):
            raise BadImage(f"{host} is a private address, from which this server fetches nothing")
    return socket.create_connection((str(found[0][4][0]), port), max(deadline - time.monotonic(), 0.01))


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the internet; addresses that wrap an IPv4 one do not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wraps = ip.version == 6 and (ip not in ipaddress.ip_network("2000::/3") or ip.sixtofour or ip.teredo)
    return ip.is_global and not ip.is_multicast and not wraps

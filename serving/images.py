"""Images in requests: data URLs, and addresses where the server may fetch them, as what the model takes.

Every image is decoded, and made as small as the model takes it, before the next one is: memory does not grow with their
number. One thread does that for all requests.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2

from common.errors import UserError, first_line
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
_SSL = ssl.create_default_context()


@dataclass(frozen=True)
class ImageReader:
    """Read the images of requests for one model. `allow_urls`: fetch them from public addresses, too."""

    prepare: ImageProcessor
    allow_urls: bool = False
    _decoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "images"))
    _fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FETCHES))

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
        return Images.join([await self._read(*source) for source in shown])

    async def _read(self, source: str, param: str) -> Images:
        loop = asyncio.get_running_loop()
        try:
            data: bytes | str = source
            if not source.startswith("data:"):
                if not self.allow_urls:
                    raise BadImage("only data URLs are read (data:image/png;base64,...): this server fetches no images")
                async with self._fetching:
                    data = await fetch_image(source)
            return await loop.run_in_executor(self._decoding, functools.partial(self._decode, data))
        except UserError as error:
            raise ApiError(400, f"{param}: {error}", param, "invalid_image") from error

    def _decode(self, data: bytes | str) -> Images:
        images = self.prepare([open_data_url(data) if isinstance(data, str) else open_image(data)])
        assert images is not None
        return images


# ---- addresses


async def fetch_image(url: str) -> bytes:
    """Return what is at an http(s) address. Raises BadImage."""
    shown = f"{url:.80}"
    settings = dict(transport=PublicTransport(), timeout=None, trust_env=False)
    headers = {"User-Agent": "minimind", "Accept": "image/*", "Accept-Encoding": "identity"}
    address = url
    try:
        async with asyncio.timeout(FETCH_SECONDS), httpx2.AsyncClient(**settings, headers=headers) as client:
            for _ in range(MAX_REDIRECTS + 1):
                target = httpx2.URL(address)
                if target.scheme not in ("http", "https") or not target.host:
                    raise BadImage(f"{address:.80} is neither a data URL nor an http or https address")
                # A client that follows redirects by itself reads and decompresses their bodies, however long they are.
                async with client.stream("GET", target, follow_redirects=False) as answer:
                    if answer.next_request is None:
                        return await _read_body(answer, shown)
                    address = str(answer.next_request.url)
        raise BadImage(f"{shown}: more than {MAX_REDIRECTS} redirects")
    except httpx2.InvalidURL:
        raise BadImage(f"{shown} is not an address") from None
    except (OSError, ValueError, httpx2.HTTPError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"{shown} cannot be fetched within {FETCH_SECONDS:g} s ({first_line(error)})") from None


async def _read_body(answer: httpx2.Response, shown: str) -> bytes:
    """Return the body of an answer as it was sent. Raises BadImage, which calls the address `shown`."""
    if answer.status_code != 200:
        raise BadImage(f"{shown} answers {answer.status_code}")
    data = bytearray()  # grows in place, however small the parts are
    async for part in answer.aiter_raw():
        data += part
        if len(data) > MAX_BYTES:
            raise BadImage(f"{shown} is larger than {MAX_BYTES >> 20} MB")
    return bytes(data)


class PublicTransport(httpx2.AsyncHTTPTransport):
    """Connect to public addresses only: with this server's help nobody shall see what only machines of its network can.

    The name of a host is resolved once, also after a redirect, and what was checked is what is connected to.
    """

    def __init__(self) -> None:
        super().__init__(verify=_SSL)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [str(address[0]) for *_, address in found]
        if not all(map(is_public, addresses)):
            raise BadImage(f"{url.host} is a private address, from which this server fetches nothing")
        target = url.copy_with(host=addresses[0])
        extensions = request.extensions | {"sni_hostname": url.host}
        checked = httpx2.Request(request.method, target, headers=request.headers, extensions=extensions)
        return await super().handle_async_request(checked)


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the internet; addresses that wrap an IPv4 one do not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wraps = ip.version == 6 and (ip not in ipaddress.ip_network("2000::/3") or ip.sixtofour or ip.teredo)
    return ip.is_global and not ip.is_multicast and not wraps

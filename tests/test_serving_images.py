"""Images in requests: what the model sees, what is refused, and what the server fetches from where."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.server
import io
import socket
import struct
import threading
import zlib

import httpx2
import openai
import psutil
import pytest
from PIL import Image
from serving_helpers import IMAGE_IDS, NAME, TOKENIZER, png, serving

from data_pipeline.images import BadImage, data_url, open_image
from inference.generator import generate_text
from inference.options import SamplingParams
from inference.vision import ImageProcessor
from model.chat_format import render_chat, with_images
from serving import images as serving_images
from serving.images import MAX_IMAGES, fetch_image, is_public


def image_part(data: bytes | str) -> dict:
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else data_url(data)}}


def question(text: str, *images: bytes | str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}, *map(image_part, images)]}


@pytest.fixture(scope="module")
def server():
    with serving(sees=True, allow_urls=True) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def alone(server, messages: list[dict], pictures: list[bytes], n: int = 12) -> str:
    """The greedy answer to a chat without the server, `with_images` in its questions."""
    ids = render_chat(TOKENIZER, messages, add_generation_prompt=True, image_ids=IMAGE_IDS)[0]
    prepared = ImageProcessor(server.model, None)([open_image(data) for data in pictures])
    return generate_text(server.model, TOKENIZER, [ids], SamplingParams(max_new_tokens=n), images=[prepared])[0]


def test_answers_are_about_the_image(server, client):
    answers = set()
    for seed in (0, 1, 2, 0):
        chat = [question("What is this?", png(seed))]
        found = client.chat.completions.create(model=NAME, messages=chat, temperature=0, max_tokens=12, n=2)
        expected = alone(server, [{"role": "user", "content": with_images("What is this?", 1)}], [png(seed)])
        assert [choice.message.content for choice in found.choices] == [expected] * 2
        stream = client.chat.completions.create(model=NAME, messages=chat, temperature=0, max_tokens=12, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
        answers.add(expected)
    assert len(answers) == 3
    text = server.chat("What is this?", temperature=0, max_tokens=12)[1]
    assert text["choices"][0]["message"]["content"] == alone(server, [{"role": "user", "content": "What is this?"}], [])
    assert found.usage.prompt_tokens == text["usage"]["prompt_tokens"] + len(IMAGE_IDS) + 1  # and a line end


def test_several_images_several_questions_and_the_other_endpoint(server, client):
    chat = [
        question("one?", png(1), png(2)),
        {"role": "assistant", "content": "a\ufffc"},
        question("\ufffctwo?", png(3)),
    ]
    plain = [
        {"role": "user", "content": with_images("one?", 2)},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": with_images("two?", 1)},
    ]
    settings = dict(model=NAME, temperature=0, max_tokens=12)
    found = client.chat.completions.create(messages=chat, **settings).choices[0].message.content
    assert found == alone(server, plain, [png(1), png(2), png(3)])
    # The first turn is left out with its images.
    cut = client.chat.completions.create(messages=chat, **settings, extra_body={"truncate_prompt_tokens": 40})
    assert cut.choices[0].message.content == alone(server, plain[2:], [png(3)]) != found
    content = [{"type": "input_text", "text": "one?"}]
    content += [{"type": "input_image", "image_url": data_url(png(i)), "detail": "auto"} for i in (1, 2)]
    answer = client.responses.create(
        model=NAME, input=[{"role": "user", "content": content}], temperature=0, max_output_tokens=12
    )
    assert answer.output_text == alone(server, plain[:1], [png(1), png(2)])


def encoded(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def bomb() -> bytes:
    """A PNG of a few bytes that says 50,000 x 50,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="1" height="1"/></svg>'
BAD_IMAGES = {
    "a truncated PNG": (encoded("png", png(0, 64)[:-2000]), "a damaged image"),
    "a bomb": (encoded("png", bomb()), "far more pixels than the 40,000,000"),
    "SVG": (encoded("svg+xml", SVG), "not an image of a known format"),
    "SVG that says PNG": (encoded("png", SVG), "not an image of a known format"),
    "an animation": (encoded("gif", animation()), "an animation"),
    "a wrong type": (encoded("jpeg", png(0)), "says jpeg, and it is a PNG"),
    "no image": (encoded("png", b""), "no bytes"),
    "no base64": ("data:image/png;base64,####", "not base64"),
    "cut base64": (encoded("png", png(0))[:-3], "not base64"),
    "no data": ("data:image/png,abc", "not a data URL in base64"),
    "another type": ("data:text/html;base64,AAAA", "text/html, not an image"),
    "half a surrogate pair": ("data:image/png;base64,\ud800", "not base64"),
    "an empty address": ("", "neither a data URL nor an http"),
    "a file": ("file:///etc/passwd", ": file:///etc/passwd is neither a data URL nor an http"),
    "a word": ("nothing", ": nothing is neither a data URL nor an http"),
    "no address": ("http://[::1", "is not an address"),
    "this machine": ("http://127.0.0.1:9/x.png", "a private address"),
    "its name": ("http://localhost/x.png", "a private address"),
    "IPv6": ("http://[::1]/x.png", "a private address"),
    "metadata of a cloud": ("http://169.254.169.254/latest", "a private address"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_cannot_be_used(server, name):
    url, reason = BAD_IMAGES[name]
    status, body = server.post("/v1/chat/completions", messages=[question("?", png(0), url)])
    assert status == 400 and body["error"]["param"] == "messages[0].content[2].image_url"
    assert reason in body["error"]["message"] and body["error"]["code"] == "invalid_image"


@pytest.mark.parametrize(
    ("message", "param", "reason"),
    [
        (question("?", *[png(0)] * (MAX_IMAGES + 1)), "messages", f"the limit is {MAX_IMAGES}"),
        (question("?", png(0)) | {"role": "system"}, "messages[0].content", "only messages of the user"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "messages[0].content", "image_url"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content", "image_url"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content", '"type": "image_url"'),
    ],
)
def test_requests_with_images_that_cannot_be(server, message, param, reason):
    status, body = server.post("/v1/chat/completions", messages=[message])
    assert (status, body["error"]["param"]) == (400, param) and reason in body["error"]["message"]


def test_tokens_of_an_image_without_one(server):
    prompt = [1, *IMAGE_IDS, 50]
    for path, fields in (("/v1/completions", {"prompt": prompt}), ("/v1/embeddings", {"input": [prompt]})):
        status, body = server.post(path, **fields)
        assert status == 400 and "tokens that stand for an image" in body["error"]["message"]
    assert server.post("/v1/completions", prompt=TOKENIZER.decode(IMAGE_IDS), max_tokens=1)[0] == 200  # it is text


def test_memory_stays_flat(server):
    """One image at a time is decoded: many large ones, and bad ones, need no more memory than one."""
    buffer = io.BytesIO()
    Image.new("RGB", (2400, 2400)).save(buffer, "PNG")  # 17 MB as RGB
    bad = [url for url, reason in BAD_IMAGES.values() if "address" not in reason]
    process, highest = psutil.Process(), 0
    chats = [[question("?", *[buffer.getvalue()] * n)] for n in (2, 8)]
    assert server.post("/v1/chat/completions", messages=chats[0], max_tokens=1)[0] == 200
    before = process.memory_info().rss
    done = threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for url in bad:
        server.post("/v1/chat/completions", messages=[question("?", url)])
    assert server.post("/v1/chat/completions", messages=chats[1], max_tokens=1)[0] == 200
    done.set()
    watcher.join()
    assert highest - before < 80e6  # all of them at once would be 138 MB, the bomb 7.5 GB


def test_a_large_body_is_for_images_only(server):
    large = question("?", "data:image/png;base64," + "A" * 2_000_000)
    assert server.post("/v1/chat/completions", messages=[large])[0] == 400
    with serving() as blind:
        assert blind.post("/v1/chat/completions", messages=[large])[0] == 413
        status, body = blind.post("/v1/chat/completions", messages=[question("?", png(0))])
        assert status == 400 and "this model does not see images" in body["error"]["message"]


# ---- addresses


class Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"x")
                    threading.Event().wait(0.02)
            return
        targets = {"there": "/1.png", "unread": "/1.png", "away": "http://127.0.0.2:1/x.png", "loop": "/loop"}
        target = (targets | {"ftp": "ftp://127.0.0.1/x.png"}).get(name)
        self.send_response(302 if target else 200 if name in ("1.png", "large", "text") else 404)
        if target:
            self.send_header("Location", target)
        if name == "unread":  # 1 GB for a client that decompresses it, and it never ends
            body = gzip.compress(bytes(2**20)) * 1000
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body) + 1))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)
                self.rfile.read(1)  # until the client is gone
            return
        self.end_headers()
        if not target:
            self.wfile.write({"1.png": png(1), "large": bytes(2000)}.get(name, b"hello"))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def pictures():
    """A web server that counts as public, unlike every other address of this machine."""
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_images, "is_public", lambda address: address == "127.0.0.1")
        yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize("name", ["1.png", "there", "unread"])
def test_fetched_images_are_those_of_data_urls(server, pictures, name):
    answers = [
        server.post("/v1/chat/completions", messages=[question("?", url)], temperature=0, max_tokens=8)[1]["choices"]
        for url in (f"{pictures}/{name}", data_url(png(1)))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("away", "127.0.0.2 is a private address"),
        ("loop", "more than 3 redirects"),
        ("ftp", "ftp://127.0.0.1/x.png is neither a data URL nor an http"),
        ("none", "answers 404"),
        ("text", "not an image of a known format"),
        ("large", "is larger than"),
        ("slow", "cannot be"),
    ],
)
def test_addresses_that_give_no_image(server, pictures, monkeypatch, name, reason):
    monkeypatch.setattr(serving_images, "MAX_BYTES", 1000)
    monkeypatch.setattr(serving_images, "FETCH_SECONDS", 0.3)
    status, body = server.post("/v1/chat/completions", messages=[question("?", f"{pictures}/{name}")])
    found = body["error"]["message"]
    assert status == 400 and (reason in found or (name == "slow" and "known format" in found)), found


def test_what_was_checked_is_what_is_connected_to(monkeypatch):
    """A name that is public when it is looked up first and private afterwards; the certificate is the name's."""
    resolved = iter(["93.184.215.14", "10.0.0.1"])
    connected: list[httpx2.Request] = []

    def getaddrinfo(host, port, *_, **__):
        assert host == "pictures.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(resolved), port))]

    async def connect(self, request):
        connected.append(request)
        return httpx2.Response(302, headers={"Location": "/2.png"})

    monkeypatch.setattr(serving_images, "is_public", is_public)  # as it is without `pictures`
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", connect)
    with pytest.raises(BadImage, match=r"pictures\.example is a private address"):  # where it is redirected to
        asyncio.run(fetch_image("https://pictures.example/1.png"))
    (request,) = connected
    assert request.url == "https://93.184.215.14/1.png" and request.headers["Host"] == "pictures.example"
    assert request.extensions["sni_hostname"] == "pictures.example" and serving_images._SSL.check_hostname


def test_a_server_that_says_nothing_is_left_in_time(server, pictures, monkeypatch):
    """With https, where the handshake already waits."""
    monkeypatch.setattr(serving_images, "FETCH_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/x.png"
        status, body = server.post("/v1/chat/completions", messages=[question("?", url)])
    assert status == 400 and "cannot be fetched within 0.3 s (TimeoutError)" in body["error"]["message"], body


def test_addresses_are_only_fetched_where_it_is_allowed(pictures):
    with serving(sees=True) as found:
        status, body = found.post("/v1/chat/completions", messages=[question("?", f"{pictures}/1.png")])
    assert status == 400 and "this server fetches no images" in body["error"]["message"]


def test_which_addresses_are_public():
    public = ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
    private = ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1"]
    private += ["::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1"]
    assert all(map(is_public, public)) and not any(map(is_public, private))

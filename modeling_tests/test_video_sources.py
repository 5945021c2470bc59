"""Where videos come from, and what a reading may take."""

import base64
import contextlib
import http.server
import io
import os
import re
import socket
import threading
import time

import numpy as np
import PIL.Image
import pytest
import torch

av = pytest.importorskip("av", reason="reading video files needs PyAV")

from fuzz_video import fuzz  # noqa: E402
from video_files import frame_index, moving_square, write_video  # noqa: E402

from linvt_hf.video_http import HttpFile, is_public  # noqa: E402
from linvt_hf.video_limits import Limits  # noqa: E402
from linvt_hf.video_reading import VideoReadError, read_video  # noqa: E402
from linvt_hf.video_sources import has_times  # noqa: E402

FRAMES = moving_square(40)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", FRAMES, codec="mpeg4", gop=8)


@pytest.fixture
def server(mp4):
    """A function from settings to the URL of a server of that file; `.asked` holds its requests' ranges."""
    servers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            settings, data = self.server.settings, self.server.settings.get("data", mp4.read_bytes())
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            self.server.asked.append(asked and (int(asked[1]), int(asked[2])))
            if "location" in settings and self.path != "/there.mp4":
                self.send_response(302)
                self.send_header("Location", settings["location"])
                self.end_headers()
                return
            if settings.get("status"):
                self.send_error(settings["status"])
                return
            if asked and settings.get("parts", True):
                start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
                data = data[start:end]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for byte in data if settings.get("slowly") else ():
                self.wfile.write(bytes([byte]))
                time.sleep(settings["slowly"])
            self.wfile.write(data[: settings.get("breaks_after", len(data))])

        def log_message(self, *args):
            pass

    def start(**settings):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.settings, server.asked = settings, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        start.asked = server.asked
        return f"http://127.0.0.1:{server.server_port}/clip.mp4?signature=secret"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("parts", [True, False])
def test_a_servers_file(mp4, server, parts):
    clip, local = read_video(server(parts=parts), num_frames=6), read_video(mp4, num_frames=6)
    assert torch.equal(clip.frames, local.frames) and torch.equal(clip.times, local.times)


def test_only_what_is_needed_is_fetched(server, tmp_path):
    """Of a long file: its table of contents, and the groups of pictures of the wanted frames."""
    grain = np.random.default_rng(0).integers(0, 255, (60, 240, 320, 3), dtype=np.uint8)
    data = write_video(
        tmp_path / "big.mp4", grain, codec="mpeg4", gop=5, options={"qmin": "1", "qmax": "2"}
    ).read_bytes()
    assert len(data) > 4 * 2**20
    clip = read_video(server(data=data), indices=[1, 2, 30])
    assert torch.equal(clip.frames, read_video(data, indices=[1, 2, 30]).frames)
    assert sum(end - start + 1 for start, end in server.asked) < 0.5 * len(data)


def test_a_file_of_a_server_is_a_file(server):
    data = np.random.default_rng(0).integers(0, 255, 3 * 2**20, dtype=np.uint8).tobytes()
    ours, plain = io.BufferedReader(HttpFile(server(data=data), "it", Limits())), io.BytesIO(data)
    draw = np.random.default_rng(1)
    for _ in range(40):
        at, count = int(draw.integers(0, len(data) + 10)), int(draw.integers(0, 2**19))
        assert ours.seek(at) == plain.seek(at)
        assert ours.read(count) == plain.read(count) and ours.tell() == plain.tell()
    assert ours.seek(-5, io.SEEK_END) == len(data) - 5 and ours.read() == data[-5:]


@pytest.mark.parametrize(
    ("settings", "limits", "said"),
    [
        ({"status": 404}, {}, "cannot be fetched: the server says 404 Not Found."),
        ({"location": "file:///etc/passwd"}, {}, "to url 'file:///etc/passwd' is not allowed"),
        ({"location": "ftp://elsewhere/x.mp4"}, {}, "which is not http or https."),
        ({"data": b"x" * 5000}, {}, "cannot be read as a video"),
        ({"parts": False}, {"download_bytes": 1000}, "took more than limits.download_bytes=1000 to fetch; raise it."),
        ({}, {"download_bytes": 1000}, "took more than limits.download_bytes=1000 to fetch; raise it."),
        ({"parts": False, "breaks_after": 10}, {}, "cannot be fetched: the connection broke after 10 of"),
    ],
)
def test_servers_that_fail(server, settings, limits, said):
    url = server(**settings)
    with pytest.raises(VideoReadError) as caught:
        read_video(url, limits=Limits(**limits))
    assert (
        said in str(caught.value)
        and str(caught.value).startswith("'http://127.0.0.1")
        and "\n" not in str(caught.value)
    )
    assert "secret" not in str(caught.value)


def test_a_connection_that_breaks_is_taken_up(server):
    assert len(read_video(server(breaks_after=2000), num_frames=3).frames) == 3


def test_redirects_between_pages(server, mp4):
    assert len(read_video(server(location="/there.mp4"), num_frames=3).frames) == 3


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


def test_a_strangers_url_reaches_no_private_address(server, monkeypatch):
    strict = Limits(private_addresses=False)
    url = server()
    monkeypatch.setenv("http_proxy", url)  # which would ask in our stead
    port = url.split(":")[2].split("/")[0]
    for host in ("127.0.0.1", "localhost", "2130706433", "0177.0.0.1", "[::ffff:127.0.0.1]"):
        with pytest.raises(VideoReadError, match="is at a private address"):
            read_video(f"http://{host}:{port}/clip.mp4", limits=strict)
    with pytest.raises(VideoReadError, match="is at a private address"):
        read_video("https://127.0.0.1/clip.mp4", limits=strict)
    assert not server.asked


def test_the_address_that_was_checked_is_the_one_that_is_asked(server, mp4, monkeypatch):
    """As a public server would be: its name is looked up once, and a redirect to a private address is refused."""
    url, looked_up, here = server(), [], socket.create_connection
    port = url.split(":")[2].split("/")[0]

    def look_up(host, asked_port, *args, **kwargs):
        looked_up.append(host)
        address = {"videos.example": "8.8.8.8"}.get(host, "127.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, asked_port))]

    def connect(address, *args):
        assert address == ("8.8.8.8", int(port))
        monkeypatch.setattr(socket, "getaddrinfo", real)
        try:
            return here(("127.0.0.1", int(port)), *args)
        finally:
            monkeypatch.setattr(socket, "getaddrinfo", look_up)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    strict = Limits(private_addresses=False)
    clip = read_video(f"http://videos.example:{port}/clip.mp4", num_frames=3, limits=strict)
    assert torch.equal(clip.frames, read_video(mp4, num_frames=3).frames) and set(looked_up) == {"videos.example"}
    server_that_sends_on = server(location=f"http://localhost:{port}/there.mp4")
    port = server_that_sends_on.split(":")[2].split("/")[0]
    with pytest.raises(VideoReadError, match="is at a private address"):
        read_video(f"http://videos.example:{port}/clip.mp4", limits=strict)


def test_a_server_that_sends_a_byte_now_and_then(server):
    url = server(parts=False, slowly=0.05)
    began = time.monotonic()
    with pytest.raises(VideoReadError, match="took longer to fetch than limits.seconds=0.3"):
        read_video(url, limits=Limits(seconds=0.3, answer_seconds=5))
    assert time.monotonic() - began < 3


def answering(write) -> str:
    """The URL of a server that answers whatever `write` does with a connection."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = listening.accept()
        with connection, listening, contextlib.suppress(OSError):
            connection.recv(2**16)
            write(connection)

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/clip.mp4"


def test_a_server_that_never_comes_to_its_headers_end():
    def dribble(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            connection.sendall(b"a")
            time.sleep(0.05)

    def go_on(connection):
        while True:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def chunks(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            connection.sendall(b"0")
            time.sleep(0.05)

    for write in (dribble, go_on, chunks):
        began = time.monotonic()
        with pytest.raises(VideoReadError, match="took longer to fetch than limits.seconds=0.3"):
            read_video(answering(write), limits=Limits(seconds=0.3, answer_seconds=5))
        assert time.monotonic() - began < 2


def test_what_a_redirect_says_is_not_read(server):
    sent = []

    def write(connection):
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 999999999\r\n\r\n")
        for _ in range(64):
            connection.sendall(bytes(2**20))
            sent.append(2**20)

    with pytest.raises(VideoReadError, match="cannot be fetched: .*refused"):
        read_video(answering(write))
    assert len(sent) < 32


def test_parts_of_another_file(server, mp4, monkeypatch):
    url = server(data=mp4.read_bytes() + bytes(2**20))
    file = HttpFile(url, "clip", Limits())
    file.read(10)
    monkeypatch.setattr(file, "length", file.length + 1)  # as if it were another now
    file.seek(2**19)
    with pytest.raises(
        VideoReadError, match="asked for bytes 524288 and on of .*, the server gave those from 524288 on"
    ):
        file.read(10)


def test_a_url_that_is_none_keeps_its_secret():
    with pytest.raises(VideoReadError) as caught:
        read_video("http://127.0.0.1:9/a clip.mp4?signature=secret")
    assert str(caught.value).endswith("cannot be fetched: it is no valid URL.") and "secret" not in str(caught.value)


def test_no_server_there():
    with pytest.raises(VideoReadError, match="cannot be fetched: .*refused"):
        read_video("http://127.0.0.1:9/clip.mp4")


def test_data_urls(mp4):
    content = base64.b64encode(mp4.read_bytes()).decode()
    for scheme in ("data", "DATA"):
        assert torch.equal(read_video(f"{scheme}:video/mp4;base64,{content}").frames, read_video(mp4).frames)
    for url, limits, said in (
        (f"data:video/mp4;base64,{content}", Limits(download_bytes=100), "holds more than limits.download_bytes=100"),
        ("data:video/mp4;base64,%%%", None, "is not base64"),
        ("data:video/mp4;base64,", None, "holds nothing"),
        ("data:video/mp4;base64,AAAA", None, "cannot be read as a video"),
    ):
        with pytest.raises(VideoReadError, match=said):
            read_video(url, limits=limits)


def test_folders_and_globs(tmp_path):
    for number in range(12):
        PIL.Image.fromarray(FRAMES[number]).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    for source in (tmp_path, str(tmp_path), str(tmp_path / "frame*.png"), tmp_path / "*.png"):
        clip = read_video(source, num_frames=None)
        assert [frame_index(frame) for frame in clip.frames] == list(range(12)) and clip.times is None
        assert not has_times(source)
    with pytest.raises(VideoReadError, match="12 frames are asked for, and limits.frames is 5"):
        read_video(tmp_path, num_frames=None, limits=Limits(frames=5))
    with pytest.raises(ValueError, match=r"nothing\*.png' names no images"):
        read_video(str(tmp_path / "nothing*.png"))


@pytest.mark.parametrize("lines", ["#EXTM3U\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n"])
@pytest.mark.parametrize("form", ["path", "bytes", "file"])
def test_no_playlist_opens_another_file(tmp_path, mp4, lines, form):
    path = tmp_path / "list.mp4"
    path.write_text(lines.format(mp4))
    sources = {"path": path, "bytes": path.read_bytes(), "file": io.BytesIO(path.read_bytes())}
    with pytest.raises(VideoReadError, match="cannot be read as a video"):
        read_video(sources[form])


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"frame_pixels": 96 * 64 - 1}, "has frames of 96 x 64, 6,144 pixels, and limits.frame_pixels is 6,143"),
        ({"frames": 4}, "5 frames are asked for, and limits.frames is 4; ask for fewer"),
        ({"seconds": 0}, "took longer to read than limits.seconds=0; raise it."),
    ],
)
def test_limits(mp4, tmp_path, limits, said):
    animated = tmp_path / "animated.webp"
    first, *others = (PIL.Image.fromarray(frame) for frame in FRAMES[:8])
    first.save(animated, save_all=True, append_images=others, duration=100, lossless=True)
    for source in (mp4, mp4.read_bytes(), animated):
        with pytest.raises(VideoReadError, match=re.escape(said)):
            read_video(source, num_frames=5, limits=Limits(**limits))
    assert len(read_video(mp4, limits=Limits(None, None, None, None, None)).frames) == 32


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the fuzzer counts open files and memory of Linux")
def test_a_few_broken_files():
    """`make fuzz` reads many more."""
    assert fuzz(count=300, seed=10**6, seconds=20, processes=1) == []

"""A server's file, read as if it were a file here."""

import contextlib
import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from .video_index import VideoReadError
from .video_limits import Limits

BLOCK, _MOST = 2**18, 2**23  # bytes asked of a server at a time, at first and at most
_KEPT = 2**26  # bytes of a server's answers that are kept
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class HttpFile(io.RawIOBase):
    """
    A server's file, of which only what is read is fetched; all of it, to a temporary file, where the server gives no
    parts. Counts against `limits.download_bytes`, and its waiting against `limits.seconds`.
    """

    def __init__(self, url: str, name: str, limits: Limits):
        super().__init__()
        self.url, self.name, self.limits = url, name, limits
        self.fetched = self.at = 0
        self.waited = 0.0
        self.blocks: dict[int, bytes] = {}  # by where they begin, the oldest first
        self.whole: Any = None
        self._line = _Line()
        self._opener, self._next, self._size = _opener(limits.private_addresses, self._line), 0, BLOCK
        with self._request(0, BLOCK) as answer:
            total = re.fullmatch(r"bytes 0-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status == 206 and total:
                self.length = int(total[1])
                self._keep(0, self._take(answer, BLOCK))
            else:
                self.whole = tempfile.TemporaryFile()  # noqa: SIM115  closed with this file
                while piece := self._take(answer, _MOST):
                    self.whole.write(piece)
                self.length = self.whole.tell()
                promised = answer.headers.get("Content-Length", "")
                if promised.isdigit() and self.length < int(promised):
                    self.whole.close()
                    raise VideoReadError(
                        f"{name} cannot be fetched: the connection broke after {self.length} of {promised} bytes."
                    )
        if not self.length:
            raise VideoReadError(f"{name} is empty (0 bytes).")

    def _request(self, start: int, count: int) -> http.client.HTTPResponse:
        try:
            request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{start + count - 1}"})
            with self._waiting():
                return self._opener.open(request, timeout=self.limits.answer_seconds)
        except urllib.error.HTTPError as error:
            raise VideoReadError(
                f"{self.name} cannot be fetched: the server says {error.code} {error.reason}."
            ) from error
        except VideoReadError as error:
            raise VideoReadError(f"{self.name} cannot be fetched: {error}") from error
        except http.client.InvalidURL as error:  # which would repeat the whole of it
            raise VideoReadError(f"{self.name} cannot be fetched: it is no valid URL.") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise VideoReadError(f"{self.name} cannot be fetched: {getattr(error, 'reason', error)}.") from error

    def _take(self, answer: http.client.HTTPResponse, count: int) -> bytes:
        pieces, missing = [], count
        while missing:
            try:
                with self._waiting():
                    piece = answer.read1(min(missing, BLOCK))
            except (OSError, http.client.HTTPException) as error:
                raise VideoReadError(f"{self.name} cannot be fetched: the connection broke ({error}).") from error
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
            self.fetched += len(piece)
            most = self.limits.download_bytes
            if most is not None and self.fetched > most:
                raise VideoReadError(f"{self.name} took more than limits.download_bytes={most} to fetch; raise it.")
        return b"".join(pieces)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """
        Counts the time that goes by. A server may send a byte now and then, or one empty answer after another, so the
        connection is shut when there is no time left. Raises `VideoReadError` then.
        """
        began, most = time.monotonic(), self.limits.seconds
        over = None if most is None else threading.Timer(max(most - self.waited, 0), self._line.shut)
        if over is not None:
            over.daemon = True
            over.start()
        try:
            yield
        finally:
            if over is not None:
                over.cancel()
            self.waited += time.monotonic() - began
            if most is not None and self.waited >= most:
                raise VideoReadError(f"{self.name} took longer to fetch than limits.seconds={most}; raise it.")

    def _keep(self, start: int, data: bytes) -> None:
        self.blocks[start] = data
        while len(self.blocks) > 1 and sum(map(len, self.blocks.values())) > _KEPT:
            del self.blocks[next(iter(self.blocks))]

    def _block(self) -> tuple[int, bytes]:
        """A piece of the file that holds the place where reading goes on."""
        for start, data in self.blocks.items():
            if start <= self.at < start + len(data):
                return start, data
        # Who reads on gets more at a time.
        self._size = min(2 * self._size, _MOST) if self.at == self._next else BLOCK
        with self._request(self.at, self._size) as answer:
            if answer.status != 206:
                raise VideoReadError(
                    f"{self.name} cannot be fetched: the server gave parts of it, and now gives none."
                )
            part = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if part and (int(part[1]), int(part[2])) != (self.at, self.length):
                raise VideoReadError(
                    f"{self.name} cannot be fetched: asked for bytes {self.at} and on of {self.length}, the server "
                    f"gave those from {part[1]} on of {part[2]}."
                )
            data = self._take(answer, self._size)
        if not data:
            raise VideoReadError(f"{self.name} cannot be fetched: the server sent nothing.")
        self._keep(self.at, data)
        self._next = self.at + len(data)
        return self.at, data

    def readinto(self, buffer) -> int:
        if self.at >= self.length:
            return 0
        if self.whole is not None:
            self.whole.seek(self.at)
            count = self.whole.readinto(buffer)
        else:
            start, data = self._block()
            piece = data[self.at - start : self.at - start + len(buffer)]
            count = len(piece)
            buffer[:count] = piece
        self.at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence], 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self.whole is not None:
            self.whole.close()
        self._line.close()
        super().close()


class _Line:
    """The connection that is open, of the last server that was asked; to shut it from another thread."""

    def __init__(self):
        self._socket: socket.socket | None = None

    def keep(self, connected: socket.socket) -> None:
        self.close()
        # A second one of the same connection: urllib and TLS close and replace the first.
        self._socket = socket.fromfd(connected.fileno(), connected.family, connected.type)

    def shut(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # it is over, or has not begun
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


# ---- whom a request may reach ----


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Only to where a caller could have pointed: a server must not make us open a local file."""

    def http_error_302(self, req, fp, code, msg, headers):
        fp.close()  # urllib would read all of it
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise VideoReadError(f"the server redirects to {newurl[:100]!r}, which is not http or https.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_public(address: str) -> bool:
    """Whether an IP address, as text, is one of the open internet, and so is any IPv4 address that it stands for."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6:
        inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        ip = inside or ip
    return ip.is_global and not ip.is_multicast


def _connect(host: str, port: int, timeout: float | None) -> socket.socket:
    """To a public address. The one that was checked is asked: the next time, a name may mean another."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(is_public(address[0]) for *_, address in found):
        raise VideoReadError("its server is at a private address, and limits.private_addresses is False.")
    failed: OSError = OSError(f"{host} has no address")
    for *_, address in found:
        try:
            return socket.create_connection(address[:2], timeout)
        except OSError as error:
            failed = error
    raise failed


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args, line: _Line, **kwargs):
        super().__init__(*args, **kwargs)
        self.line = line

    def connect(self) -> None:
        super().connect()
        self.line.keep(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, *args, line: _Line, context: ssl.SSLContext, **kwargs):
        super().__init__(*args, context=context, **kwargs)
        self.line, self.secured_by = line, context

    def connect(self) -> None:
        super().connect()
        self.line.keep(self.sock)


class _PublicConnection(_Connection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.timeout)
        self.line.keep(self.sock)


class _PublicSecureConnection(_SecureConnection):
    def connect(self) -> None:
        plain = _connect(self.host, self.port, self.timeout)
        self.line.keep(plain)
        self.sock = self.secured_by.wrap_socket(plain, server_hostname=self.host)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, connection: Callable[..., http.client.HTTPConnection]):
        super().__init__()
        self._connection = connection

    def http_open(self, req):
        return self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connection: Callable[..., http.client.HTTPConnection]):
        super().__init__()
        self._connection = functools.partial(connection, context=ssl.create_default_context())

    def https_open(self, req):
        return self.do_open(self._connection, req)


def _opener(private_addresses: bool, line: _Line) -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # without urllib's handlers of files, ftp and data
    kinds = (_Connection, _SecureConnection) if private_addresses else (_PublicConnection, _PublicSecureConnection)
    plain, secure = (functools.partial(kind, line=line) for kind in kinds)
    for handler in (
        *([urllib.request.ProxyHandler()] if private_addresses else []),
        _Http(plain),
        _Https(secure),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


__all__ = ["BLOCK", "HttpFile", "is_public"]

"""A server's file, read as if it were a file here."""

import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import tempfile
import time
import urllib.error
import urllib.request
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
        self._opener, self._next, self._size = _opener(limits.private_addresses), 0, BLOCK
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
        began = time.monotonic()
        try:
            request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{start + count - 1}"})
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
        finally:
            self._wait(began)

    def _take(self, answer: http.client.HTTPResponse, count: int) -> bytes:
        pieces, missing = [], count
        while missing:
            began = time.monotonic()
            try:
                # What has come, so that a server that sends a byte now and then is not waited for without end.
                piece = answer.read1(min(missing, BLOCK))
            except (OSError, http.client.HTTPException) as error:
                raise VideoReadError(f"{self.name} cannot be fetched: the connection broke ({error}).") from error
            self._wait(began)
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
            self.fetched += len(piece)
            most = self.limits.download_bytes
            if most is not None and self.fetched > most:
                raise VideoReadError(f"{self.name} took more than limits.download_bytes={most} to fetch; raise it.")
        return b"".join(pieces)

    def _wait(self, began: float) -> None:
        self.waited += time.monotonic() - began
        if self.limits.seconds is not None and self.waited > self.limits.seconds:
            raise VideoReadError(
                f"{self.name} took longer to fetch than limits.seconds={self.limits.seconds}; raise it."
            )

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
        super().close()


# ---- whom a request may reach ----


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Only to where a caller could have pointed: a server must not make us open a local file."""

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


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.timeout)


class _PublicSecureConnection(http.client.HTTPSConnection):
    def __init__(self, *args, context: ssl.SSLContext, **kwargs):
        super().__init__(*args, context=context, **kwargs)
        self._secured_by = context

    def connect(self) -> None:
        plain = _connect(self.host, self.port, self.timeout)
        self.sock = self._secured_by.wrap_socket(plain, server_hostname=self.host)


class _PublicHttp(urllib.request.HTTPHandler):
    def http_open(self, req):
        return self.do_open(_PublicConnection, req)


class _PublicHttps(urllib.request.HTTPSHandler):
    def https_open(self, req):
        return self.do_open(functools.partial(_PublicSecureConnection, context=ssl.create_default_context()), req)


def _opener(private_addresses: bool) -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # without urllib's handlers of files, ftp and data
    anywhere = (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
    for handler in (
        *(anywhere if private_addresses else (_PublicHttp, _PublicHttps)),
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


__all__ = ["BLOCK", "HttpFile", "is_public"]

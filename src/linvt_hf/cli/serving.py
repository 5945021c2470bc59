"""`linvt serve`: a model over HTTP."""

import os
import socket
from dataclasses import fields
from pathlib import Path

from .shared import add_model, count, load, say, settings_of


def add_commands(commands) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer over HTTP as OpenAI's API does, with video_url parts",
        description="Answers POST /v1/chat/completions as OpenAI's API does, with parts of type video_url, which are "
        "http(s) and data: URLs. Requests reach no file here and no private address, unless allowed.",
    )
    add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="0 for any that is free (8000)")
    serve.add_argument("--name", help="the model's name to clients; by default MODEL")
    serve.add_argument(
        "--api-key", default=os.environ.get("LINVT_API_KEY"), help="what clients must send; by default $LINVT_API_KEY"
    )
    serve.add_argument("--allow-files", type=Path, metavar="FOLDER", help="requests may name the files in it")
    serve.add_argument(
        "--allow-private", action="store_true", help="requests may name servers here and in private networks"
    )
    serve.add_argument("--batch-size", type=count, default=8, help="questions answered at a time (8)")
    serve.add_argument("--cache-mb", type=int, default=1024, help="encoded videos that are remembered (1024)")
    for name, kind, default, what in (
        ("max-requests", int, 64, "taken at a time; one more is told to come back later"),
        ("max-body-mb", int, 64, "of a request, its data: URLs among it"),
        ("max-video-mb", int, 512, "of a video that is fetched"),
        ("max-frames", int, 256, "read of a video"),
        ("max-new-tokens", int, 1024, "of an answer"),
        ("default-new-tokens", int, 256, "of an answer whose request sets no limit"),
        ("fetch-seconds", float, 60.0, "for fetching, and again for reading, a video"),
        ("answer-seconds", float, 300.0, "from a request to the end of its answer"),
        ("close-seconds", float, 30.0, "that answers may still take when the server is stopped"),
    ):
        serve.add_argument(f"--{name}", type=kind, default=default, help=f"{what} ({default:g})")
    serve.set_defaults(run=_serve)


def _serve(args) -> None:
    try:
        import uvicorn

        from linvt_hf.serving.app import ServerSettings, create_app
        from linvt_hf.serving.engine import Engine
    except ImportError as error:
        raise ImportError(f"A server needs more packages ({error}): pip install 'linvt_hf[serve]'.") from error
    args.name = args.name or args.model
    settings = settings_of(args, ServerSettings)
    if args.allow_files is not None and not args.allow_files.is_dir():
        raise ValueError(f"--allow-files: there is no folder {args.allow_files}.")
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"--{field.name.replace('_', '-')} is {value}; it must be above 0.")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port is {args.port}; ports are 0 to 65535.")
    with _listening(args.host, args.port) as listening:  # before the model is loaded: it is wrong at once, or never
        engine = Engine(
            load(args),
            batch_size=args.batch_size,
            max_waiting=args.max_requests,
            cache_bytes=args.cache_mb * 2**20,
        )
        app = create_app(engine, settings, args.close_seconds)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {settings.name} at http://{shown}:{port}/v1")
        config = uvicorn.Config(app, timeout_graceful_shutdown=round(args.close_seconds), log_level="warning")
        uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise OSError(f"Nothing can listen at {host}, port {port}: {error.strerror or error}.") from error
    return listening

"""`moai view DIR ...`: prepared directories in a browser of this machine."""

from __future__ import annotations

import argparse
import webbrowser
from importlib.util import find_spec
from pathlib import Path

from moai.core.errors import ConfigError

LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="prepared directories")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="the port to listen on (any free one)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine only)")
    parser.add_argument(
        "--i-know", action="store_true", help="listen on an address that others reach: whoever has the URL reads all"
    )
    parser.add_argument("--no-browser", action="store_true", help="print the URL only")


def view(given: argparse.Namespace) -> None:
    """Serve until told to stop. Raises ConfigError, DamagedError."""
    if missing := [name for name in ("starlette", "uvicorn") if not find_spec(name)]:
        raise ConfigError(f"moai view needs {' and '.join(missing)}: pip install 'moai[view]'")
    if given.host not in LOCAL and not given.i_know:
        raise ConfigError(
            f"--host {given.host}: others could read these directories; say --i-know if they may, or leave --host out "
            f"and reach this machine through ssh -L"
        )
    if not 0 <= given.port < 65_536:
        raise ConfigError(f"--port {given.port}: is a number from 0 to 65,535")
    from moai.view.directory import Directory
    from moai.view.server import serve

    paths = list(dict.fromkeys(path.resolve() for path in given.directories))
    directories = [Directory.open(path, str(number)) for number, path in enumerate(paths)]

    def announce(url: str) -> None:
        print(url, flush=True)
        if not given.no_browser:
            webbrowser.open(url)

    extra = () if given.host in LOCAL else (given.host,)
    serve(directories, host=given.host, port=given.port, announce=announce, hosts=extra)

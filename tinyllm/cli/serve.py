"""`tinyllm serve`: an OpenAI-compatible server, with a page that shows the engine at work."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.cli import console, options
from tinyllm.cli.console import UsageError
from tinyllm.errors import ConfigError
from tinyllm.hub import LARGER_MODEL

if TYPE_CHECKING:
    from tinyllm.server.config import ServerConfig

__all__ = ["add_parser"]

DEFAULT_MAX_STALL = 10.0
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

_EPILOG = """\
examples:
  tinyllm serve
  tinyllm serve --model tales-4m --port 9000
  tinyllm serve --model model.gguf --api-key "$(cat key.txt)" --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "Once upon a time", "max_tokens": 40}'

Any client of OpenAI's API works: base_url is http://HOST:PORT/v1, and any api_key unless the server has keys.
At / is a page to chat and to watch the KV cache, at /docs the API, at /metrics what Prometheus reads.

Without --model, it is SmolLM2, which is downloaded once (93 MB). Keys are also read from TINYLLM_API_KEYS, with commas
between them: arguments can be seen by all users of a machine. --max-stall is 10 here unless it is given: streams go on
while a long prompt comes in. On SIGTERM or Ctrl-C running requests finish, and new
ones are refused; a second signal ends the server at once.
"""

_LIMITS = {  # option -> field of ServerConfig
    "--max-waiting": "max_waiting",
    "--max-body-nbytes": "max_body_nbytes",
    "--max-prompt-tokens": "max_prompt_tokens",
    "--max-prompts": "max_prompts",
    "--max-n": "max_n",
    "--max-logprobs": "max_logprobs",
    "--drain-seconds": "drain_seconds",
    "--served-model-name": "model_name",
    "--api-key": "api_keys",
    "--allow-host": "allowed_hosts",
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Serves a model over HTTP, to clients of OpenAI's API and to browsers.",
        epilog=_EPILOG,
    )
    options.add_model_option(parser, default=LARGER_MODEL)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen at (default: 127.0.0.1, this machine)")
    add("--port", type=int, default=8000, metavar="N", help="port to listen at (default: 8000; 0: any)")
    add("--api-key", action="append", metavar="KEY", help="serve only who sends this key; may be given several times")
    add(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="what clients may call this host besides localhost, where it listens at this machine alone; may be given "
        "several times",
    )
    add("--served-model-name", metavar="NAME", help="what clients call the model (default: its own name)")
    add("--access-log", action="store_true", help="a line on stderr for each request")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add(
        "--max-waiting",
        type=int,
        metavar="N",
        help="requests that may wait; more are told to come again (default: 256)",
    )
    add("--max-body-nbytes", type=int, metavar="N", help="the largest request body (default: 2097152)")
    add("--max-prompt-tokens", type=int, metavar="N", help="the longest prompt (default: what the context holds)")
    add("--max-prompts", type=int, metavar="N", help="prompts in one request (default: 64)")
    add("--max-n", type=int, metavar="N", help="continuations of one prompt, beams too (default: 16)")
    add("--max-logprobs", type=int, metavar="N", help="most likely tokens to report (default: 20)")
    add(
        "--drain-seconds", type=float, metavar="X", help="how long running requests may finish at the end (default: 30)"
    )
    options.add_engine_options(parser)
    parser.add_argument("--record", metavar="FILE", help="write every step into a recording, for replay and timeline")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from tinyllm.server.run import bind, serve
        from tinyllm.server.service import Service
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}: pip install 'tinyllm[serve]'") from None
    config = _config(args)
    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port must be from 0 to 65535, not {args.port}")
    if args.max_stall is None:
        args.max_stall = DEFAULT_MAX_STALL
    sock = bind(args.host, args.port)
    try:
        llm = options.load_llm(args)
        service = Service(llm, config)
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if not config.api_keys and not _is_loopback(host):
            console.notice("anyone who reaches this address is served: --api-key asks for a key")
        console.notice(f"{config.model_name} is served at http://{shown}:{port} (the API at /v1 and /docs)")
        serve(service, sock, access_log=args.access_log)
    finally:
        sock.close()
    return 0


def _config(args: argparse.Namespace) -> ServerConfig:
    """Raises UsageError naming the option whose value is wrong."""
    from tinyllm.server.config import ServerConfig

    given = {field: getattr(args, option[2:].replace("-", "_")) for option, field in _LIMITS.items()}
    fields = {field: value for field, value in given.items() if value is not None}
    name = fields.pop("model_name", None) or _own_name(args.model or args.default_model)
    from_environment = [key.strip() for key in os.environ.get("TINYLLM_API_KEYS", "").split(",") if key.strip()]
    allowed = fields.get("allowed_hosts", [])
    if allowed or _is_loopback(args.host):
        fields["allowed_hosts"] = [*_LOCAL_NAMES, args.host, *allowed]
    fields["api_keys"] = [*fields.get("api_keys", ()), *from_environment]
    try:
        return ServerConfig(model_name=name, **fields)
    except ConfigError as error:
        field, space, rest = str(error).partition(" ")
        option = {field: option for option, field in _LIMITS.items()}.get(field)
        raise UsageError(f"{option}{space}{rest}" if option else str(error)) from None


def _own_name(model: str) -> str:
    """A registered name or hub id as it is; of a path its last part."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")

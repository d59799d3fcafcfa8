"""Serve the classifier over HTTP: calibrated answers, decisions, adapters.

    python classify_api.py                       # http://127.0.0.1:8000, page at /ui
    python classify_api.py --port 9000 --adapters-dir my_adapters
    uvicorn classify_api:app --port 9000         # the same, set by HOWSURE_... variables
    curl "http://127.0.0.1:8000/classify?text=Best+worst+thing+ever"

docs/SERVING.md describes addresses, settings, adapters and deployment. Every flag has a variable,
HOWSURE_PORT for --port; HOWSURE_API_KEY, if set, is what requests must carry.
Exit codes: 0 stopped by a signal after answering what was accepted, 1 failed, 2 bad usage.
"""

import argparse
import logging
import os
import signal
import socket
import sys

from serving.settings import (
    ENVIRONMENT_PREFIX,
    ServingSettings,
    api_key,
    exposure_warning,
)
from settings import ModelSettings, TaskSettings, UserError, add_arguments, from_arguments

log = logging.getLogger("howsure")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Each flag can also be set by a variable: HOWSURE_PORT for --port; a flag wins. "
        "Exit codes: 0 stopped by a signal, 1 failed, 2 bad usage.",
    )
    add_arguments(parser, ServingSettings, ModelSettings, TaskSettings)
    names = {ENVIRONMENT_PREFIX + a.dest.upper(): a.dest for a in parser._actions}
    parser.set_defaults(**{names[v]: text for v, text in os.environ.items() if v in names})
    return parser.parse_args(arguments)


def build(arguments, on_failure):
    """(application, `ServingSettings`). Raises UserError."""
    settings = from_arguments(ServingSettings, arguments)
    settings.check()
    key = api_key()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if warning := exposure_warning(settings, key):
        log.warning(warning)
    from serving.application import create_app
    from serving.service import Service

    service = Service(
        settings,
        from_arguments(ModelSettings, arguments),
        from_arguments(TaskSettings, arguments).build(),
        on_failure,
    )
    return create_app(service, key), settings


def terminate(error):
    """Stop this process as `kill` would: a server without a model is of no use."""
    log.error("error: %s", error)
    os.kill(os.getpid(), signal.SIGTERM)


def __getattr__(name):
    if name != "app":
        raise AttributeError(name)
    return build(parse_arguments([]), terminate)[0]  # for uvicorn classify_api:app


def serve(arguments):
    """Run until a signal comes. Raises UserError."""
    import uvicorn

    failures = []

    def failed(error):
        failures.append(error)
        terminate(error)

    app, settings = build(arguments, failed)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}; choose "
            "another --port or --host"
        ) from error
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="auto",
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,  # its lines hold the query, and with it texts
            server_header=False,
            timeout_graceful_shutdown=round(settings.deadline_sec) + 5,
        )
    )
    # uvicorn raises the signal again once it has stopped; by then all is done
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run(sockets=[listener])
    if failures:
        raise UserError(str(failures[0]))


def main(arguments=None):
    try:
        serve(parse_arguments(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

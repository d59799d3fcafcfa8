"""What can be set about the server: flags of classify_api.py, and environment variables.

Every flag of classify_api.py has a variable of its name, HOWSURE_PORT for --port; a flag wins. The
API key has a variable alone, HOWSURE_API_KEY, because a command line can be read by others.
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from settings import CACHE_DIR, FINE_TUNED_DIR, ROOT, UserError, setting

ENVIRONMENT_PREFIX = "HOWSURE_"
API_KEY_VARIABLE = "HOWSURE_API_KEY"
MOST_TEXTS = 256  # of one request
MOST_TOP_TOKENS = 50
MOST_SAMPLES = 1000


@dataclass(frozen=True)
class ServingSettings:
    """The server. `check` says whether the numbers make sense together."""

    host: str = setting("127.0.0.1", "address to listen on; the default answers this machine only")
    port: int = setting(8000, "port to listen on; 0 lets the system choose")
    cache_dir: str = setting(str(CACHE_DIR), "folder of the evaluation that has the calibrators")
    fine_tuned_dir: str = setting(str(FINE_TUNED_DIR), "folder of the model called finetuned")
    adapters_dir: str = setting(
        str(ROOT / "adapters"), "folder of further adapters: each folder in it is one, by its name"
    )
    max_adapters: int = setting(16, "adapters in memory; of more the least recently used leave it")
    queue_tokens: int | None = setting(
        None,
        "tokens that may wait; beyond that the answer is 503 (default: twice what is scored at "
        "once, so that nobody waits long)",
    )
    deadline_sec: float = setting(30.0, "seconds after which a waiting request is given up")
    max_text_chars: int = setting(20_000, "longest text, in characters")
    max_body_bytes: int = setting(1_048_576, "largest request body")
    body_timeout_sec: float = setting(10.0, "seconds in which a request body must have arrived")
    log: str = setting("requests", "requests, or texts: the log then also has what was sent")

    def check(self):
        """Raises UserError for a value that cannot work."""
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port must lie in 0 to 65535, got {self.port}")
        if self.log not in ("requests", "texts"):
            raise UserError(f"--log must be requests or texts, got {self.log!r}")
        for name in (
            "max_adapters",
            "queue_tokens",
            "deadline_sec",
            "max_text_chars",
            "max_body_bytes",
            "body_timeout_sec",
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 < value < float("inf"):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be above 0 and finite, got {value}")

    @property
    def adapters(self):
        return Path(self.adapters_dir)

    @property
    def fine_tuned(self):
        return Path(self.fine_tuned_dir)

    @property
    def is_local(self):
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def length_problem(text, max_text_chars):
    """Why a text is too long for a server with this limit, or None."""
    if len(text) <= max_text_chars:
        return None
    return f"the text has {len(text)} characters, at most {max_text_chars} are allowed"


def api_key():
    """The key that requests must carry, or None. Raises UserError for one that cannot be sent."""
    key = os.environ.get(API_KEY_VARIABLE)
    if key is None:
        return None
    if len(key) < 16 or not key.isascii() or not key.isprintable() or key != key.strip():
        raise UserError(
            f"{API_KEY_VARIABLE} must be at least 16 printable ASCII characters without spaces at "
            'its ends; make one with: python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return key


def exposure_warning(settings, key):
    """What to say when others can reach the server, or None."""
    if settings.is_local:
        return None
    where = f"listening on {settings.host}: other machines can reach this server"
    if key is None:
        return f"{where} and it asks for no key; set {API_KEY_VARIABLE}, and put TLS in front of it"
    return f"{where}; the key travels in the clear unless TLS is in front of it"

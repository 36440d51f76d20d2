"""The server's own settings: default, check and help of each."""

import re
from dataclasses import dataclass

from jpaged.rules import FLAG, Rule, check_all, documented, integer, number, number_above, optional, setting

_NAME = Rule(
    str,
    lambda name: isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable(),
    "a name of 1 to 200 printable characters",
)
_WORD = Rule(str, lambda word: isinstance(word, str) and word != "", "a string that is not empty")


def _is_origin(origin: object) -> bool:
    """Whether browsers may send this as an origin; "*" stands for all of them."""
    return isinstance(origin, str) and re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin) is not None


_ORIGINS = Rule(
    list,
    lambda origins: isinstance(origins, list | tuple) and all(map(_is_origin, origins)),
    "a list of origins, each like https://example.org",
)
_SECONDS = number_above(0, 86400)


@documented
@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of one server.

    Raises:
        ValueError: a setting out of range, with the value and the range.
    """

    served_model_name: str = setting(
        "jpaged", _NAME, "name of the model in requests and responses; a model from the hub keeps its own otherwise"
    )
    strict_params: bool = setting(
        False, FLAG, "refuse requests with unknown fields, which are otherwise named in a header of the response"
    )
    keep_alive_s: float = setting(
        15.0, number_above(0, 3600), "seconds without output after which a stream gets a comment, so that it stays open"
    )
    max_prompts: int = setting(1024, integer(1, 1 << 16), "most prompts of one request")
    max_sequences: int = setting(
        1024, integer(1, 1 << 16), "most sequences of one request, which are its prompts times ``n`` or ``best_of``"
    )
    max_logprobs_entries: int = setting(
        1 << 20,
        integer(1, 1 << 40),
        "most log-probabilities that one request may ask for, over all of its tokens and their alternatives",
    )
    max_prefixes: int = setting(16, integer(0, 1 << 16), "most prefixes that one key may pin")
    max_pinned_fraction: float = setting(0.25, number(0, 1), "fraction of the blocks that all pinned prefixes may take")
    max_prefix_ttl_s: float = setting(
        3600.0, _SECONDS, "seconds that a prefix stays pinned, unless its request asks for fewer"
    )
    host: str = setting("127.0.0.1", _WORD, "address to bind; any other than this machine's own needs keys")
    port: int = setting(8000, integer(0, 65535), "port to bind; 0 is one that is free")
    unix_socket: str | None = setting(
        None, optional(_WORD), "path of a socket to bind instead of an address", unset="none"
    )
    api_key_file: str | None = setting(
        None, optional(_WORD), "TOML file of API keys; the variable JPAGED_API_KEY has more", unset="none"
    )
    insecure: bool = setting(False, FLAG, "serve other machines without keys")
    allowed_origins: list[str] | tuple[str, ...] = setting(  # noqa: RUF009
        (), _ORIGINS, "origins whose pages may ask from a browser", unset="none; may be given several times"
    )
    metrics_without_key: bool = setting(False, FLAG, "let /metrics be read without a key")
    otlp_traces_endpoint: str | None = setting(
        None, optional(_WORD), "URL of an OpenTelemetry collector that gets traces, over HTTP", unset="no traces"
    )
    max_body_bytes: int = setting(
        8 << 20, integer(1, 1 << 34), "most bytes of the body of a request; all others wait while it is parsed"
    )
    max_pending_bytes: int = setting(256 << 20, integer(1, 1 << 40), "most bytes of the bodies of all requests")
    max_connections: int = setting(4096, integer(1, 1 << 20), "most connections at once")
    head_timeout_s: float = setting(10.0, _SECONDS, "seconds for the headers of a request")
    body_timeout_s: float = setting(30.0, _SECONDS, "seconds for the body of a request, and one more for each 64 KiB")
    write_timeout_s: float = setting(60.0, _SECONDS, "seconds after which a client that does not read is cut off")
    idle_timeout_s: float = setting(30.0, _SECONDS, "seconds after which a connection without a request is closed")
    max_waiting_sequences: int = setting(4096, integer(1, 1 << 24), "most sequences that wait for the engine")
    max_waiting_tokens: int = setting(1 << 22, integer(1, 1 << 40), "most prompt tokens that wait for the engine")
    request_timeout_s: float | None = setting(
        None, optional(_SECONDS), "seconds after which a request is ended", unset="no limit"
    )
    drain_timeout_s: float = setting(
        30.0, _SECONDS, "seconds that running requests get to end when the server is told to"
    )
    max_failed_steps: int = setting(
        12, integer(3, 1 << 20), "failed steps of the engine in a row after which the server ends with an error"
    )

    def __post_init__(self) -> None:
        check_all(self)

"""The server's own settings: default, check and help of each."""

from dataclasses import dataclass

from jpaged.rules import FLAG, Rule, check_all, documented, integer, number_above, setting

_NAME = Rule(
    str,
    lambda name: isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable(),
    "a name of 1 to 200 printable characters",
)


@documented
@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of one server.

    Raises:
        ValueError: a setting out of range, with the value and the range.
    """

    served_model_name: str = setting("jpaged", _NAME, "name of the model in requests and responses")
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

    def __post_init__(self) -> None:
        check_all(self)

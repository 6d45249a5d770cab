"""The vocabulary: what is spotted, and what must be told apart from it."""

from __future__ import annotations

KEYWORDS = (
    "hello", "yes", "no", "stop", "go", "left", "right", "up",
    "down", "on", "off", "play", "pause", "next", "help", "cancel",
)  # fmt: skip
UNKNOWN = "unknown"
LABELS = (*KEYWORDS, UNKNOWN)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Spoken in training as "unknown". Half of them sound like a keyword; none is a homophone of one.
OTHER_WORDS = _words(
    """
    yellow hollow fellow hero below mellow halo yet less yesterday chess guess nose note know-how nor low toe
    snow nobody step top shop stuff stopwatch stock goal ghost goat good gold grow lift leaf laugh loft lead
    light ride ripe rate bright rich cup us hub upset app town dawn dull dot brown one own arm honest
    honour of awful cough orphan plane plate clay pray place plain cause post horse pose port text neck nest
    index necks held health shelf hell yelp candle camel handle castle cancer
    zero two three four five six seven eight nine ten eleven twelve monday friday morning evening water
    coffee music window door table chair house garden river mountain computer keyboard telephone message
    weather today tomorrow answer question people children happy quickly slowly under between because
    another picture letter number minute second louder quieter open close start begin finish volume
    """
)

# Never heard in training: only the test set has them.
UNHEARD_WORDS = _words(
    """
    jello hallow nexus yesteryear knob stomp gopher lefty writer puppy clown onion offer player applause
    texture helmet council purple sister bottle kitchen forest engine silver planet market doctor seventeen
    wednesday remember important beautiful understand airport banana radio camera pencil
    """
)

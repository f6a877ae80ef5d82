r"""Text of strangers in Markdown: shown as it is, and never obeyed.

    f"# {plain(name)}"                        # literally, whatever is in it
    fenced(command, "bash")                   # a code block that its content cannot end

Names of files, classes, data sets and models come from outside. Characters that hide or reorder
what is written (controls, bidirectional overrides, zero-width spaces, bytes that are no Unicode)
are spelt out as \u202e.

    spelt_out("caf\udce9.png") == r"caf\udce9.png"     # what a file of UTF-8 can hold
    read_back(r"caf\udce9.png")                         # what opens the file again

That is the house's one way to write such a name as text: in tables, and, by JSON's own rules, in
JSON. A backslash that would read as the beginning of one is written as \u005c.
"""

import logging
import re

# the bytes of a name that is no valid Unicode, as Python holds them
ODD_BYTES = re.compile("[\ud800-\udfff]")
UNSEEN = re.compile(
    "["
    # controls but tab and newline
    "\x00-\x08\x0b-\x1f\x7f-\x9f"
    # zero-width and bidirectional marks, line separators, byte order mark
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    # tags, lone surrogates
    "\U000e0000-\U000e007f\ud800-\udfff"
    "]"
)
# characters of Markdown and HTML
_SPECIAL = re.compile(
    r"[^\w\s.,:;%()/+=°-]"
    # what starts a link by itself
    r"|:(?=//)|(?<=www)\."
    # underscores at the edge of a word
    r"|(?<![^\W_])_|_(?![^\W_])",
    re.IGNORECASE,
)

# the two ways of spelling a character, and a backslash that looks like one of them
_SPELT = re.compile(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
_LIKE_SPELT = re.compile(r"\\(?=u[0-9a-f]{4}|U[0-9a-f]{8})")


# --- characters that are spelt out


def spelt_out(text: str, characters: re.Pattern[str] = ODD_BYTES) -> str:
    r"""`text` with some characters as \u and four digits, or \U and eight; `read_back` reads it."""
    return characters.sub(_spell, _LIKE_SPELT.sub(r"\\u005c", text))


def _spell(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def read_back(text: str) -> str:
    """What `spelt_out` made `text` of."""
    return _SPELT.sub(_unspell, text)


def _unspell(found: re.Match[str]) -> str:
    number = int(found[1] or found[2], 16)
    # no character: left as it is written
    return chr(number) if number < 0x110000 else found[0]


# --- Markdown


def visible(text: object) -> str:
    """`text` with every character that cannot be seen spelt out; tabs and newlines stay."""
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def on_terminal(text: object) -> str:
    r"""`text` with nothing that a terminal obeys, and line ends as \n: no name forges a line."""
    return visible(text).replace("\n", "\\n").replace("\t", " ")


class VisibleFormatter(logging.Formatter):
    """A log whose messages are one line each, whatever is in them; tracebacks stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return on_terminal(super().formatMessage(record))


def one_line(text: object) -> str:
    """`text` with every run of white space as one blank, and nothing hidden."""
    return visible(" ".join(str(text).split()))


def plain(text: object) -> str:
    """`text` for running Markdown: every character that means something becomes an HTML entity."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def fenced(text: object, language: str) -> str:
    """`text` as a code block whose fence is longer than any run of backticks inside."""
    content = visible(text)
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content}\n{fence}"

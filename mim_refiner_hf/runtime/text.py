"""Text of strangers in Markdown: shown as it is, and never obeyed.

    f"# {plain(name)}"                        # literally, whatever is in it
    fenced(command, "bash")                   # a code block that its content cannot end

Names of files, classes, data sets and models come from outside. Characters that hide or reorder
what is written (controls, bidirectional overrides, zero-width spaces, bytes that are no Unicode)
are spelt out as \\u202e.
"""

import re

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


def visible(text: object) -> str:
    """`text` with every character that cannot be seen spelt out; tabs and newlines stay."""
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


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


__all__ = ["fenced", "one_line", "plain", "visible"]

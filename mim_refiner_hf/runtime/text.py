"""Text of strangers in Markdown: names of files, classes, data sets and models, shown as they are and never obeyed.

    f"# {plain(name)}"                                        # literally, whatever is in it
    fenced(command, "bash")                                   # a code block that its content cannot end

Characters that hide or reorder what is written (controls, bidirectional overrides, zero-width spaces, bytes that are no Unicode) are
spelt out as \\u202e.
"""

import re

# controls but tab and newline, zero-width and bidirectional marks, line separators, byte order mark, tags, lone surrogates
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
# Markdown and HTML characters, what starts a link by itself ("://", "www."), and underscores at the edge of a word
SPECIAL = re.compile(
    r"[^\w\s.,:;%()/+=°-]|:(?=//)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])", re.IGNORECASE
)


def visible(text: object) -> str:
    """`text` with every character that cannot be seen spelt out; tabs and newlines stay."""
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def one_line(text: object) -> str:
    """`text` with every run of white space as one blank, and nothing hidden."""
    return visible(" ".join(str(text).split()))


def plain(text: object) -> str:
    """`text` for running Markdown, shown literally: every character that means something becomes an HTML entity."""
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def fenced(text: object, language: str) -> str:
    """`text` as a code block whose fence is longer than any run of backticks inside."""
    seen = visible(text)
    longest = max((len(run) for run in re.findall("`+", seen)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{seen}\n{fence}"


__all__ = ["fenced", "one_line", "plain", "visible"]

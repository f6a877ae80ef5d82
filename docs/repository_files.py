"""A hook of mkdocs: what a page links outside docs/ becomes a part of the site.

Pages link files of the repository as GitHub shows them, `../benchmarks/README.md`. Each such file,
and what it links in turn, is added to the site under its own path, and the links are rewritten, so
that `mkdocs build --strict` finds every one of them. A link to a folder stays as its bare text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def linked_path(source: Path, link: str) -> Path | None:
    """The file or folder of the repository that a link in `source` names, if there is one."""
    if "://" in link:
        return None
    path = (source.parent / link).resolve()
    return path if path.exists() and path.is_relative_to(ROOT) else None


def site_path(path: Path) -> str:
    """Where a file of the repository lies in the site: docs/ is its top."""
    top = DOCS if path.is_relative_to(DOCS) else ROOT
    return path.relative_to(top).as_posix()


def source_path(src_uri: str) -> Path:
    """The other way round."""
    inside = DOCS / src_uri
    return inside if inside.exists() else ROOT / src_uri


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link, and what that links, until nothing new is found."""
    waiting = [source_path(file.src_uri) for file in files.documentation_pages()]
    known = set(waiting)

    while waiting:
        source = waiting.pop()
        if source.suffix != ".md":
            continue

        for _, _, link, _ in LINK.findall(source.read_text(encoding="utf-8")):
            path = linked_path(source, link)
            if path is None or path in known or path.is_dir():
                continue

            known.add(path)
            waiting.append(path)
            if not path.is_relative_to(DOCS):
                files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links as the repository has them into links as the site has them."""
    source = source_path(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        mark, text, link, anchor = match.groups()
        path = linked_path(source, link)
        if path is None:
            return match[0]
        if path.is_dir():
            return text
        return f"{mark}[{text}]({posixpath.relpath(site_path(path), folder)}{anchor or ''})"

    return LINK.sub(rewritten, markdown)

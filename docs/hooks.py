"""Hooks of mkdocs: links that leave docs/ lead to the repository, so that one Markdown serves GitHub and the site."""

import posixpath
import re

_LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+(?=(?:#[^)\s]+)?\))")


def on_page_markdown(markdown, page, config, files):
    """Rewrite relative links such as ../../examples/sft.py to the file's page in the repository.

    Args:
        markdown: the text of the page.
        page: its mkdocs Page.
        config: of mkdocs; `repo_url` is where the links lead.
        files: all files of the site.

    Returns:
        the text with those links replaced.
    """
    folder = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[0]))
        return link[0] if target.startswith("docs/") else f"{config['repo_url'].rstrip('/')}/blob/main/{target}"

    return _LINK.sub(replace, markdown)

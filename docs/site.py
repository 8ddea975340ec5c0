"""What the builder of the site does beside copying pages: the README comes first, and links to code lead to it."""

import pathlib
import re
import tomllib
from typing import Any

from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

ROOT = pathlib.Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# A link to a file of the repository that is no page, from a page in docs/.
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_config(config: Any) -> None:
    """Says where the project lives."""
    config["repo_url"], config["repo_name"] = REPOSITORY, config["site_name"]


def on_files(files: Any, config: Any) -> None:
    """Adds the README as the first page, whose links begin in docs/ then."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((?!https?:|#|[a-z]+\.(?:md|svg))([^)#]+)", r"](../\1", text)
    files.append(File.generated(config, "index.md", content=text))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository lead there."""
    return _OUTSIDE.sub(rf"]({REPOSITORY}/blob/main/\1", markdown)

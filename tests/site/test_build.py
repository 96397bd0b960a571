"""The built site without a browser: its links, its order, its formulas, and nothing from outside."""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import torch

from .conftest import ROOT

LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
SECTIONS = ["Start", "Guides", "Reference", "Design", "Performance", "Contributing"]


class Page(HTMLParser):
    """What a page links to, loads, and can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADING and LOADING[tag] in values and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values[LOADING[tag]])


@pytest.fixture(scope="session")
def parsed(site: Path, pages: list[str]) -> dict[str, Page]:
    return {page: Page((site / page).read_text(encoding="utf-8")) for page in pages}


def broken_links(parsed: dict[str, Page], site: Path) -> list[str]:
    broken = []
    for page, content in parsed.items():
        for link in content.links:
            parts = urlsplit(urljoin(f"http://site/{page}", link))
            if parts.netloc != "site" or page == "404.html":
                continue
            target = unquote(parts.path.lstrip("/")) or "index.html"
            exists = target in parsed or (site / target).is_file()
            fragment = unquote(parts.fragment)
            if not exists or (fragment and target in parsed and fragment not in parsed[target].anchors):
                broken.append(f"{page}: {link}")
    return broken


def test_every_internal_link_and_anchor_exists(parsed: dict[str, Page], site: Path) -> None:
    assert broken_links(parsed, site) == []
    assert sum(len(content.links) for content in parsed.values()) > 300


def test_a_broken_link_is_found(parsed: dict[str, Page], site: Path) -> None:
    planted = {**parsed, "planted.html": Page('<a href="nowhere.html"></a><a href="index.html#nowhere"></a>')}
    assert broken_links(planted, site) == ["planted.html: nowhere.html", "planted.html: index.html#nowhere"]


def test_nothing_is_loaded_from_outside(parsed: dict[str, Page], site: Path) -> None:
    outside = [load for content in parsed.values() for load in content.loads if re.match(r"(https?:)?//", load)]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert outside == []
    assert re.findall(r"url\([\"']?(?:https?:)?//|@import", styles) == []


def test_the_sections_stand_in_their_order(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    tabs = text[text.index('class="md-tabs__list"') :].split("</ul>")[0]
    assert re.findall(r">\s*([A-Z]\w+)\s*<", tabs) == SECTIONS


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written == set(re.findall(r'"([\w/-]+\.md)"', config))


@pytest.mark.parametrize("page", ["numerics.html", "reference/optimizers.html"])
def test_formulas_are_mathml(page: str, site: Path) -> None:
    text = (site / page).read_text(encoding="utf-8")
    shown = re.sub(r"<(pre|code|math)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert "<math" in text
    assert "$" not in re.sub(r"<script.*?</script>", "", shown, flags=re.DOTALL)
    assert ".. math::" not in text


def test_the_search_knows_what_the_reference_says_of_an_option(site: Path) -> None:
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))["items"]
    assert [e for e in entries if e["location"].startswith("reference/") and "max_grad_norm" in e["text"]]


def exported(package: Path) -> list[str]:
    """`__all__` of a package that may need triton to be imported."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    return list(ast.literal_eval(values[0]))


def test_the_reference_names_every_public_class_and_function(site: Path) -> None:
    from dragon.vm import testing
    from dragon.vm.torch import creation, optim

    anchors = {
        anchor
        for path in (site / "reference").glob("*.html")
        for anchor in Page(path.read_text(encoding="utf-8")).anchors
    }
    # The others are PyTorch's, whose pages show them.
    expected = {f"dragon.vm.torch.optim.{name}" for name in optim.__all__ if not hasattr(torch.optim, name)}
    expected |= {f"dragon.vm.torch.optim.{name}" for name in ("Adam", "AdamW", "SGD", "Optimizer")}
    expected |= {f"dragon.vm.testing.{name}" for name in testing.__all__ if callable(getattr(testing, name))}
    expected |= {f"dragon.kernels.{name}" for name in exported(ROOT / "kernels")}
    methods = {name for kind in optim.Adam.__mro__ if kind.__module__.startswith("dragon.") for name in vars(kind)}
    # One is a class's own, one PyTorch's means of wrapping a step, which its own pages do not show either.
    methods -= {"from_torch", "profile_hook_step"}
    expected |= {f"dragon.vm.torch.optim.Optimizer.{name}" for name in methods if name[0] != "_"}
    assert expected - anchors == set()

    def words(page: str) -> set[str]:
        return set(re.findall(r"\w+", (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")))

    assert set(testing.__all__) - words("testing.md") == set()
    assert set(creation.NAMES) - words("torch.md") == set()

"""The page: complete, needs nothing else, and no text in it becomes markup or script."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mlpmem_ds.stages.viewing.html import Passage, render_page, report_details, report_summary
from mlpmem_ds.stages.viewing.token_views import Candidate, Opinion, TokenView

from ..conftest import make_arm, make_evaluation

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def make_view(text: str, *, base: bool = False, memory: bool = False, top: str = "x") -> TokenView:
    candidates = (Candidate(text=top, probability=0.75), Candidate(text="\n", probability=0.125))
    opinion = Opinion(
        base=0.1,
        memory=0.75,
        joint=0.35,
        weight=0.4,
        base_is_right=base,
        memory_is_right=memory,
        base_top=candidates,
        memory_top=candidates,
    )
    return TokenView(text=text, opinion=opinion)


def make_page(text: str = " word", top: str = "likely") -> str:
    views = [TokenView(text="first", opinion=None), make_view(text, memory=True, top=top)]
    return render_page("a <title>", [Passage(title="one & two", views=views)])


def test_tokens_are_marked_by_who_was_right() -> None:
    views = [make_view(str(number), base=number > 1, memory=number % 2 == 1) for number in range(4)]
    page = render_page("t", [Passage(title="p", views=views, num_given=1)])
    kinds = re.findall(r'<span class="(\w+)" tabindex="0" data-at="0,(\d)">', page)
    assert kinds == [("memory", "1"), ("base", "2"), ("both", "3")]
    assert '<span class="given">0</span>' in page


def test_texts_are_shown_as_they_are() -> None:
    page = make_page(text="</script><b>\n", top="</script>&")
    assert page.count("</script>") == 1 and "<b>" not in page
    assert "&lt;/script&gt;&lt;b&gt;↵\n" in page and "a &lt;title&gt;" in page and "one &amp; two" in page
    (data,) = re.findall(r"const data = (.*);\n", page)
    assert json.loads(data)[0][1]["b"][0] == ["</script>&", 0.75]


def test_the_page_loads_nothing() -> None:
    assert not re.search(r"""(src|href)=["']?(?!data:)|@import|url\(|https?://""", make_page())


def test_a_reports_result_table_and_pictures_are_in_it(tmp_path: Path) -> None:
    (tmp_path / "lambda.png").write_bytes(b"\x89PNG")
    arms = (make_arm("base", ppl=20.0), make_arm("base+memory", ppl=16.0))
    evaluation = make_evaluation(*arms, subject="base+memory")
    summary = report_summary(evaluation)
    assert "20.00" in summary and "With the memory 16.00" in summary and "<td>base+memory</td>" in summary
    (title, picture) = report_details(evaluation, tmp_path)
    assert 'src="data:image/png;base64,iVBORw=="' in picture


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_what_was_likely(tmp_path: Path) -> None:
    """The script chooses a token where only the memory was right, and shows its lists."""
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(make_page(top="so likely"), encoding="utf-8")
    assert CHROMIUM is not None
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [*words, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    panel = done.stdout.partition('id="panel"')[2].partition("<script>")[0]
    assert panel.count("so␣likely") == 2 and "75.0 %" in panel and "λ: 0.400" in panel
    subprocess.run(
        [*words, f"--screenshot={picture}", path.as_uri()], capture_output=True, timeout=120, check=True
    )
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000

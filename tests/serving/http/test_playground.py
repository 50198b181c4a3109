"""The playground in a real browser, by keyboard.

A prompt is typed, its text fills position by position, and nothing complains or leaves the machine.
"""

import threading

import pytest
from helpers.browser import opened
from helpers.processes import until
from helpers.service import hosted, listening

pytestmark = pytest.mark.long

CONTROL = 2


def test_a_typed_prompt_is_seen_to_fill_and_an_infilled_one_too(runs, tmp_path):
    with hosted(runs / "whole", engine={"block_tokens": [8]}) as (host, app), listening(app) as url:
        # A small network is too quick to be watched: after six calls it waits until it has been looked at.
        quick, calls, goes_on = host.engine.tick, iter(range(6)), threading.Event()

        def tick():
            if next(calls, None) is None:
                goes_on.wait(60)
            return quick()

        host.engine.tick = tick
        with opened(url, tmp_path / "profile") as page:
            page.until("document.getElementById('model')?.textContent.includes('tiny')")
            assert page.evaluate("document.activeElement.id") == "prompt"
            page.press("a", 65, CONTROL)
            page.evaluate("document.activeElement.select()")
            page.write("the model reads")
            page.evaluate("document.getElementById('length').value = 14")
            page.press("Enter", 13, CONTROL)
            page.until("document.querySelectorAll('#canvas .token').length >= 5")
            page.picture(tmp_path / "during.png")
            seen = page.evaluate(
                "[document.querySelectorAll('#canvas .mask').length, "
                "document.querySelectorAll('#canvas .token').length]"
            )
            assert 0 < seen[0] < 14 and sum(seen) == 14
            assert page.evaluate("document.querySelector('#canvas .token').style.backgroundColor")
            goes_on.set()
            page.until("document.getElementById('canvas').dataset.done")
            page.picture(tmp_path / "after.png")
            assert page.evaluate("document.querySelectorAll('#canvas .mask').length") == 0
            shown = page.evaluate("document.getElementById('canvas').textContent")
            assert shown.startswith("the model reads") and len(shown) > len("the model reads")
            said = page.evaluate("document.getElementById('status').textContent")
            assert "network calls" in said
            seed = int(said.rpartition(" ")[2])
            assert shown == "the model reads" + host.model.sample("the model reads", length_tokens=14, seed=seed)[0]

            page.evaluate(
                "delete document.getElementById('canvas').dataset.done; document.getElementById('infill').open = true"
            )
            page.evaluate("document.getElementById('suffix').focus()")
            page.write(" and writes")
            page.press("Enter", 13, CONTROL)
            page.until("document.getElementById('canvas').dataset.done")
            shown = page.evaluate("document.getElementById('canvas').textContent")
            assert shown.startswith("the model reads") and shown.endswith(" and writes")

            goes_on.clear()
            page.press("Enter", 13, CONTROL)
            page.until("!document.getElementById('stop').disabled")
            page.press("Escape", 27)
            page.until("document.getElementById('status').textContent == 'stopped'")
            goes_on.set()
            until(lambda: host.engine.num_active == 0)
            assert page.complaints == []
            assert all(asked.startswith((url, "data:", "about:")) for asked in page.requested)

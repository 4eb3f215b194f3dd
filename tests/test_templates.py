"""A template that runs away is ended in time and memory, wherever it is, and takes nothing else with it."""

import sys
import threading
import time
from subprocess import run

import pytest

from specexec.errors import BadMessages
from specexec.text import templates

HELLO: list[dict[str, object]] = [{"role": "user", "content": "Hi\u2028 <b>'\"é 🙂"}]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ (10 ** (10 ** 9)) % 7 }}", "did not end within"),  # one call, which nothing in this process could end
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "did not end within"),
        ("{{ 'x' | center(2 * 10**9) }}", "MiB of memory"),
        ("{% set n = namespace(x='x' * 2**24) %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}", "MiB"),
        ("{{ 'x' * 2 * 10**7 }}", "made 20,000,000 characters"),
        ("{{ 1 / 0 }}", "refuses these messages: division by zero"),
        ("{{ raise_exception('no such role') }}", "refuses these messages: no such role"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_goes_wrong_is_refused(template: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0 if problem == "did not end within" else 60.0)
    with pytest.raises(BadMessages, match=problem):
        templates.render(template, HELLO, {})
    assert templates.render("{{ messages[0].content }}", HELLO, {}) == HELLO[0]["content"]


def test_a_template_that_does_not_end_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 120.0)
    templates.render("{{ messages[0].content }}", HELLO, {})
    stuck = {threading.Thread(target=refused, args=(f"{{{{ {n} * 10 ** (10 ** 9) }}}}",)) for n in range(2)}
    for thread in stuck:
        thread.start()
    began_s = time.monotonic()
    while len(templates._processes().running) < 3:
        assert templates.render("{{ messages[0].content }}", HELLO, {}) == HELLO[0]["content"]
        assert time.monotonic() - began_s < 60
    assert templates.render("{{ messages[0].content }}", HELLO, {}) == HELLO[0]["content"]
    assert all(thread.is_alive() for thread in stuck)
    templates._processes().close()
    for thread in stuck:
        thread.join()


def refused(template: str) -> None:
    with pytest.raises(BadMessages, match="did not end"):
        templates.render(template, HELLO, {})


def test_reading_a_template_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constants are computed before it is rendered."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    assert templates.damage("{% for message in messages %}{% break %}{% endfor %}") is None
    assert templates.damage("{{ (11 ** (10 ** 9)) % 7 }}") == "it did not end within 0.5 s"
    assert "unknown tag 'nowhere'" in (templates.damage("{% nowhere %}") or "")


def test_a_text_of_ones_own_is_filled_within_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    assert templates.fill("{{ text }} for {{ price + 1 }}\n", {"text": "1 < 2 é\u2028", "price": 2}) == (
        "1 < 2 é\u2028 for 3\n"
    )
    for template, problem in (
        ("{{ text * (10 ** 9) }}", "did not end within|MiB of memory"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end within"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ text.__class__ }}", "unsafe"),
    ):
        with pytest.raises(templates.TemplateFailed, match=problem):
            templates.fill(template, {"text": "x" * 100})


def test_what_is_no_json_is_refused_by_name() -> None:
    with pytest.raises(BadMessages, match="not JSON"):
        templates.render("", HELLO, {"when": object()})


def test_rendering_is_quick_and_safe_from_threads() -> None:
    templates.render("{{ messages[0].content }}", HELLO, {})
    found: list[bool] = []

    def work(number: int) -> None:
        for turn in range(20):
            found.append(
                templates.render("{{ number }}-{{ turn }}", HELLO, {"number": number, "turn": turn})
                == f"{number}-{turn}"
            )

    began_s = time.thread_time()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(found)
    assert time.thread_time() - began_s < 1


def test_the_process_ends_with_the_program_and_imports_no_torch() -> None:
    program = (
        "from specexec.text import templates\n"
        "print(templates.render('ok', [{'role': 'user'}], {}), *(one.pid for one in templates._processes().running))\n"
        "import sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    word, pid = done.stdout.split()
    assert word == "ok"
    assert run(["ps", "-p", pid], capture_output=True, check=False).returncode == 1

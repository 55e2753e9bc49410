"""`label.py` in a process of its own, its page in headless Chromium, and its file in train.py."""

import json
import signal
from argparse import Namespace
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from rwkv_rlhf.commands import label, train
from rwkv_rlhf.data.conversation import normalise
from rwkv_rlhf.data.opening import open_pairs
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.serving.labelling import win_sentence
from rwkv_rlhf.serving.votes import win_rate
from tests.support.files import VOCAB, jsonl, read_jsonl
from tests.support.processes import started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("label")]
CHROMIUM = Path("/usr/bin/chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    if not CHROMIUM.exists():
        pytest.skip("there is no Chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def words(base_model, vocab_file, tmp_path):
    """The command: five prompts, short answers that differ."""
    prompts = jsonl(tmp_path / "prompts.jsonl", *({"prompt": f"say {n} <b>now</b>"} for n in range(5)))
    found = ["--load_model", base_model, "--vocab_file", vocab_file, "--strategy", "cpu fp32", "--max_tokens", 12]
    return [*found, "--prompt_file", prompts, "--output", tmp_path / "pairs.jsonl", "--top_p", 1, "--port", 0]


class Labelling:
    """A server and its page; `quiet` is what the page must not have done."""

    def __init__(self, browser, words, width=1280):
        self.process = started("label.py", *words)
        line = self.process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line + self.process.stderr.read()
        self.address = line.split()[1]
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.noise: list[str] = []
        self.page.on("console", lambda said: self.noise.append(said.text))
        self.page.on("pageerror", lambda error: self.noise.append(str(error)))
        self.page.on("request", lambda asked: self.noise.append(asked.url) if self.foreign(asked.url) else None)
        self.page.goto(self.address)

    def foreign(self, url):
        return not url.startswith((self.address.split("/?")[0] + "/", "data:"))

    def whole(self):
        """Both answers of the pair that is shown, once they are whole."""
        expect(self.page.locator("[data-vote=left]")).to_be_enabled(timeout=100000)
        return [normalise(self.page.locator(f"#answer{side} .text").text_content()) for side in (0, 1)]

    def press(self, key, says):
        """A key, after which the progress says something."""
        self.page.keyboard.press(key)
        expect(self.page.locator("#progress")).to_contain_text(says, timeout=100000)

    def end(self, number=signal.SIGINT):
        """The exit status and what was printed."""
        self.page.close()
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=100)
        return self.process.returncode, out, err


def test_a_person_labels_is_killed_and_goes_on(browser, words, tmp_path, script, base_model, vocab_file):
    """If this breaks, an hour of comparing answers is lost, or is not what train.py learns."""
    work, out = Labelling(browser, words), tmp_path / "pairs.jsonl"
    try:
        page = work.page
        first = work.whole()
        assert page.locator("#turns .text").inner_text() == "say 0 <b>now</b>" and first[0] != first[1]
        work.press("1", "1 vote, 1 pair, 4 prompts left")
        (row,) = read_jsonl(out)
        assert [row["chosen"], row["rejected"]] == first
        second = work.whole()
        work.press("2", "2 votes, 2 pairs, 3")
        assert read_jsonl(out)[1]["chosen"] == second[1]
        work.press("u", "1 vote, 1 pair, 4")
        assert work.whole() == second
        work.press("3", "2 votes, 1 pair, 3")
        third = work.whole()
        page.keyboard.press("q")
        page.locator("#edited").fill("mine\n\nown")
        work.press("Control+Enter", "3 votes, 2 pairs, 2")
        assert read_jsonl(out)[1]["chosen"] == "mine\nown" and read_jsonl(out)[1]["rejected"] == third[0]
        work.whole()
        page.keyboard.press("n")
        page.locator("#text").fill("typed here")
        work.press("Control+Enter", "3 votes, 2 pairs, 3")
        expect(page.locator("#turns .text")).to_have_text("typed here")
        typed = work.whole()
        assert not work.noise and float(page.evaluate("document.body.dataset.milliseconds")) >= 0
        kept = out.read_bytes()
        assert work.end(signal.SIGKILL)[0] == -signal.SIGKILL
        work = Labelling(browser, words, width=390)
        expect(work.page.locator("#progress")).to_contain_text("3 votes, 2 pairs, 3", timeout=100000)
        assert out.read_bytes() == kept and work.whole() == typed
        work.press("1", "4 votes, 3 pairs, 2")
        for left in ("1 prompt left", "0 prompts left"):
            work.press("s", left)
        expect(work.page.locator("#nothing")).to_be_visible()
        assert work.page.evaluate("document.documentElement.scrollWidth") <= 390 and not work.noise
        status, said, err = work.end()
    finally:
        work.process.kill()
    assert status == 0 and "6 votes (2 left, 1 tie, 2 skip, 1 edit left)" in said, said + err
    assert len(open_pairs(out, load_tokenizer(VOCAB, vocab_file))) == 3
    train_words = ["--load_model", base_model, "--vocab_file", vocab_file, "--dpo", 1, "--rlhf_train_file", out]
    status, said, err = script(train.main, *train_words, "--dry_run", 1, "--proj_dir", tmp_path / "run")
    assert status == 0, err


def who_has_no_token_sees_nothing(work):
    """Another program or a foreign page can neither read nor vote."""
    asking, bare = work.page.request, work.address.split("?")[0]
    for path in ("", "current", "results", "?token=wrong"):
        assert asking.get(bare + path).status == 401
    assert asking.post(f"{bare}vote", data={"item": 0, "vote": "left"}).status == 401
    token = {"Authorization": f"Bearer {work.address.split('=')[1]}"}
    done = asking.post(f"{bare}vote", data={"item": 4, "vote": "left"}, headers=token)
    assert done.status == 409 and "has its vote already" in done.json()["error"]["message"]
    assert "default-src 'none'" in asking.get(work.address).headers["content-security-policy"]


def test_two_models_are_compared_blind(browser, words, base_of, tmp_path):
    """If this breaks, the page shows which model speaks, or the win rate is of sides instead of models."""
    work = Labelling(browser, [*words, "--compare", base_of("x060")])
    try:
        who_has_no_token_sees_nothing(work)
        for number in range(5):
            assert all(work.whole())
            work.press("1", "1 vote" if number == 0 else f"{number + 1} votes")
        source = work.page.content()
        assert "x060" not in source and "x070" not in source and not work.noise
        work.page.locator("#results").click()
        expect(work.page.locator("#outcome")).to_contain_text("95% interval")
        status, said, _ = work.end()
    finally:
        work.process.kill()
    votes = [json.loads(line) for line in (tmp_path / "pairs.jsonl.votes").read_text().splitlines()[1:]]
    wins = sum(vote["models"][0] == 0 for vote in votes)
    assert status == 0 and f"x070 was better than x060 in {wins} of 5 decided pairs" in said
    assert {tuple(vote["models"]) for vote in votes} == {(0, 1), (1, 0)}


def test_the_end_says_how_to_go_on():
    """If this breaks, a person with pairs must guess the next command, and one without is sent to train on nothing."""
    flags = Namespace(load_model="my model.pth", output="p.jsonl", vocab_file="v.txt", template="")
    assert label.next_step(flags, 0) == "p.jsonl has no pair yet: the same command goes on"
    _, last = label.next_step(flags, 2).splitlines()
    assert last.startswith("next: python train.py --load_model 'my model.pth' --dpo 1 --rlhf_train_file p.jsonl")
    assert "--vocab_file v.txt" in last and "--template" not in last
    assert win_sentence(win_rate(0, 0)) == "no pair so far: none is decided"
    assert win_sentence(win_rate(1, 1)).startswith("1 of 1 decided pair: 100% (95% interval 21%")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output", "pairs.csv"], "give a name that ends in .jsonl"),
        (["--compare", "none.pth"], "none.pth: there is no such file"),
        (["--prompt_file", "none.jsonl"], "none.jsonl"),
        (["--ahead", "-1"], "--ahead -1: must be at least 0"),
    ],
)
def test_mistakes(script, words, more, said):
    """If this breaks, a typing error costs the loading of a model, and ends in a traceback."""
    status, _, err = script(label.main, *words, *more)
    assert status == 2 and said in err and err.count("\n") == 1


def test_another_models_votes_are_refused(script, words, base_of, tmp_path):
    """If this breaks, pairs of two models are mixed in one file."""
    other = [base_of("x060") if word == words[1] else word for word in words]
    head = json.dumps({"models": []}) + "\n"
    (tmp_path / "pairs.jsonl.votes").write_text(head)
    status, _, err = script(label.main, *other)
    assert status == 2 and "holds votes of another work" in err and err.count("\n") == 1
    assert (tmp_path / "pairs.jsonl.votes").read_text() == head and not (tmp_path / "pairs.jsonl").exists()

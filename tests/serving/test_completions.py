"""`serve.py` in a process of its own, asked over HTTP as chat clients ask."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import pytest
import torch

from rwkv_rlhf.checkpoints.loading import BuildOptions, load_model
from rwkv_rlhf.commands import serve
from rwkv_rlhf.data.tokenizer import load_tokenizer
from rwkv_rlhf.generation.sampler import Sampler
from rwkv_rlhf.generation.sampling_params import SamplingParams
from tests.support.files import VOCAB
from tests.support.openai_wire import CHUNK, COMPLETION, ERROR, MODEL, MODELS
from tests.support.processes import started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("serve")]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
HI = [{"role": "user", "content": "say one"}]


@pytest.fixture(scope="module")
def client(base_model, vocab_file):
    """Asks a server that has a two-layer model under the name tiny; answers have at most 24 tokens."""
    words = ["--load_model", base_model, "--vocab_file", vocab_file, "--strategy", "cpu fp32", "--port", 0]
    process = started("serve.py", *words, "--name", "tiny", "--max_tokens", 24, "--token", "secret")
    try:
        line = process.stdout.readline()
        assert " answers at http://127.0.0.1:" in line, line + process.stderr.read()
        address = line.split(" at ")[1].split(" ")[0]
        with httpx.Client(base_url=f"{address}", headers={"Authorization": "Bearer secret"}, timeout=60) as client:
            yield client
        process.terminate()
        assert process.wait(100) is not None
    finally:
        process.kill()


def ask(client, **asked):
    """The JSON that answers a request, which must succeed."""
    done = client.post("/chat/completions", json={"messages": HI, **asked})
    assert done.status_code == 200, done.text
    jsonschema.validate(done.json(), COMPLETION)
    return done.json()


def stream(client, **asked):
    """The objects of a streamed answer."""
    found = []
    with client.stream("POST", "/chat/completions", json={"messages": HI, "stream": True, **asked}) as done:
        assert done.headers["content-type"].startswith("text/event-stream")
        for line in filter(None, done.iter_lines()):
            assert line.startswith("data: ")
            found.append(line[6:])
    assert found.pop() == "[DONE]"
    chunks = [json.loads(one) for one in found]
    for chunk in chunks:
        jsonschema.validate(chunk, CHUNK)
    return chunks


def text_of(chunks):
    """What the first choice of a stream says."""
    return "".join(one["choices"][0]["delta"].get("content", "") for one in chunks if one["choices"])


def test_an_answer_is_the_models(client, base_model, vocab_file):
    """If this breaks, a client reads something else than the model says after its conversation."""
    said = ask(client, model="tiny", temperature=0)
    letters, model = load_tokenizer(VOCAB, str(vocab_file)), load_model(base_model, BuildOptions(torch.float32))[0]
    prompt = letters.encode("User: say one\n\nAssistant:")
    (one,) = Sampler(model, letters).generate([prompt], SamplingParams(temperature=0, max_tokens=24))
    (choice,) = said["choices"]
    assert choice["message"]["content"] == one.text.strip()
    assert choice["finish_reason"] == ("stop" if one.finished else "length")
    assert said["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(one.tokens),
        "total_tokens": len(prompt) + len(one.tokens),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_says_the_same(client):
    """If this breaks, a client that streams shows another text, or halves of characters."""
    whole = ask(client, seed=3, temperature=1.3, top_p=1)
    chunks = stream(client, seed=3, temperature=1.3, top_p=1, stream_options={"include_usage": True})
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} and len(chunks) > 5
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"] and not chunks[-1]["choices"]
    assert all(one["usage"] is None for one in chunks[:-1])
    assert len({one["id"] for one in chunks}) == 1


def test_clients_at_once_hear_what_each_hears_alone(client):
    """If this breaks, an answer depends on who else is talking to the server."""

    def one(number):
        messages = [{"role": "user", "content": f"say {number} " * (number + 1)}]
        return text_of(stream(client, messages=messages, seed=number, temperature=1.2, top_p=0.9 + number / 100))

    alone = [one(number) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, range(4))) == alone and len({*alone}) == 4


def test_stops_samples_and_seeds(client):
    """If this breaks, stop, n, max_tokens or seed of a client are taken for something else."""
    whole = ask(client, seed=5, temperature=1.5, top_p=1)["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2]
    cut = ask(client, seed=5, temperature=1.5, top_p=1, stop=[middle])
    assert cut["choices"][0]["message"]["content"] == whole.split(middle)[0].strip()
    assert cut["choices"][0]["finish_reason"] == "stop"
    three = ask(client, n=3, seed=5, temperature=1.5, top_p=1, max_tokens=4)
    assert [one["index"] for one in three["choices"]] == [0, 1, 2] and three["usage"]["completion_tokens"] <= 12
    assert len({one["message"]["content"] for one in three["choices"]}) > 1
    different = {ask(client, temperature=1.5, top_p=1)["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(different) > 1
    assert ask(client, max_completion_tokens=10**6)["usage"]["completion_tokens"] <= 24


def test_log_probabilities_of_the_tokens(client, base_model, vocab_file):
    """If this breaks, a client that asks how sure the model is reads numbers of other tokens."""
    whole = ask(client, temperature=0, logprobs=True, top_logprobs=3)
    (choice,) = whole["choices"]
    told = choice["logprobs"]["content"]
    letters, model = load_tokenizer(VOCAB, str(vocab_file)), load_model(base_model, BuildOptions(torch.float32))[0]
    prompt = letters.encode("User: say one\n\nAssistant:")
    ids = [byte + 1 for one in told for byte in one["bytes"]]
    with torch.no_grad():
        logits = model.head(model(torch.tensor([prompt + ids[:-1]]))[0][0])[len(prompt) - 1 :]
    logp = torch.log_softmax(logits.double(), 1)
    assert [one["logprob"] for one in told] == pytest.approx(logp[range(len(ids)), ids].tolist(), abs=1e-3)
    best = logp.topk(3)
    for row, one in enumerate(told):
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(best.values[row].tolist(), abs=1e-3)
        assert one["logprob"] == one["top_logprobs"][0]["logprob"]  # greedy
    text = bytes(byte for one in told for byte in one["bytes"]).decode(errors="replace")
    assert text.strip() == choice["message"]["content"]
    chunks = stream(client, temperature=0, logprobs=True, top_logprobs=3)
    streamed = [each for one in chunks if (found := one["choices"][0]["logprobs"]) for each in found["content"]]
    assert [one["token"] for one in streamed] == [one["token"] for one in told]
    assert all(one["choices"][0]["logprobs"] is None for one in stream(client, temperature=0))


def test_tools_stand_in_the_prompt(client):
    """If this breaks, a client's tools are lost in silence."""
    plain, tooled = ask(client, max_tokens=1), ask(client, max_tokens=1, tools=[TOOL], tool_choice="auto")
    assert tooled["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 100
    assert (
        ask(client, max_tokens=1, tools=[TOOL], tool_choice="none")["usage"]["prompt_tokens"]
        == (plain["usage"]["prompt_tokens"])
    )
    assert (
        text_of(stream(client, seed=3, tools=[TOOL]))
        == ask(client, seed=3, tools=[TOOL])["choices"][0]["message"]["content"]
    )


def test_the_next_turn_finds_its_state(client):
    """If this breaks, long conversations answer later and later."""
    asked = [{"role": "user", "content": "a long question about rivers and lakes"}]
    first = ask(client, messages=asked, temperature=0)
    answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"] or "x"}
    longer = [*asked, answer, {"role": "user", "content": "go on"}]
    second = ask(client, messages=longer, temperature=0)["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
    assert (
        ask(client, messages=longer, temperature=0)["usage"]["prompt_tokens_details"]["cached_tokens"]
        > (second["prompt_tokens_details"]["cached_tokens"])
    )


def test_models(client):
    """If this breaks, a client's list of models is empty."""
    done = client.get("/models").json()
    jsonschema.validate(done, MODELS)
    assert [one["id"] for one in done["data"]] == ["tiny"]
    jsonschema.validate(client.get("/models/tiny").json(), MODEL)


WRONG = [
    ({"model": "gpt-9"}, 404, "the model 'gpt-9' does not exist; this server has 'tiny'"),
    ({"messages": []}, 400, "messages is empty"),
    ({"messages": "hi"}, 400, "messages must be a list"),
    ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, 400, "ends with the assistant's words"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
    ({"temperature": -1}, 400, "temperature -1.0: must be at least 0"),
    ({"temperature": "warm"}, 400, "temperature must be a number"),
    ({"max_tokens": 1.5}, 400, "max_tokens must be a whole number"),
    ({"n": 0}, 400, "n must be 1 to 16"),
    ({"stop": [1]}, 400, "stop must be a text"),
    ({"stream": "yes"}, 400, "stream must be true or false"),
    ({"tools": "a hammer"}, 400, "tools must be a list"),
    ({"tools": [TOOL], "tool_choice": "required"}, 400, "tool_choice is not built"),
    ({"top_logprobs": 3}, 400, "top_logprobs must be 0 to 20, with logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be 0 to 20"),
]


@pytest.mark.parametrize(("asked", "status", "said"), WRONG)
def test_what_cannot_be_is_a_sentence(client, asked, status, said):
    """If this breaks, a client's mistake ends in a traceback, or is taken for something else in silence."""
    done = client.post("/chat/completions", json={"messages": HI, **asked})
    jsonschema.validate(done.json(), ERROR)
    assert done.status_code == status and said in done.json()["error"]["message"]


def test_who_may_ask(client):
    """If this breaks, a page of somebody else's, or a program without the token, uses the model."""
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        done = client.get("/models", headers=headers)
        assert done.status_code == 401 and jsonschema.validate(done.json(), ERROR) is None
    assert client.get("/models", headers={"Host": "evil.example"}).status_code == 403
    form = {"Content-Type": "text/plain"}
    assert client.post("/chat/completions", content=json.dumps({"messages": HI}), headers=form).status_code == 415
    assert (
        client.post("/chat/completions", content="{", headers={"Content-Type": "application/json"}).status_code == 400
    )
    assert client.get("/nothing").status_code == 404 and "is not offered" in client.get("/nothing").text
    assert client.get("/chat/completions").status_code == 405


def test_a_client_that_leaves_holds_nobody_up(client):
    """If this breaks, answers that nobody reads go on, or the server ends with them."""
    with client.stream("POST", "/chat/completions", json={"messages": HI, "stream": True}) as done:
        next(done.iter_lines())
    assert ask(client, max_tokens=3)["usage"]["completion_tokens"] <= 3


def test_an_occupied_port(script, base_model, vocab_file):
    """If this breaks, the model is loaded first, and then a traceback ends it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = script(serve.main, "--load_model", base_model, "--vocab_file", vocab_file, "--port", port)
    assert status == 2 and f"--port {port} is in use by another program" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "--port 70000: must be 0 to 65535"),
        (["--host", "300.1.1.1", "--port", "0"], "cannot be listened at"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--template", "none"], "--template none is not known"),
    ],
)
def test_mistakes_on_the_command_line(script, base_model, words, said):
    """If this breaks, a typing error is a traceback."""
    status, _, err = script(serve.main, "--load_model", base_model, *words)
    assert status == 2 and said in err and err.count("\n") == 1

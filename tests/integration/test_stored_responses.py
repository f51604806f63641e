"""Responses of a deployment with two frontends and two keys: whoever a connection comes to, it finds its own."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.deployment import Deployment

pytestmark = pytest.mark.slow

KEYS = ("key-of-team-one", "key-of-team-two")
TRIES = 16
"""Connections until both frontends have been met, all but surely."""
BODY: dict[str, Any] = {"input": "Say something.", "max_output_tokens": 8, "ignore_eos": True}
ENDLESS = {**BODY, "max_output_tokens": 1500, "background": True, "stream": True}


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[Deployment]:
    words = ("--load-format", "dummy", "--num-blocks", "600", "--unified", "1", "--frontends", "2")
    limits = ("--max-model-len", "2048", "--max-stored-responses", "40")
    with Deployment(*words, *limits, "--api-key", *KEYS, model=str(tiny_model)) as deployment:
        deployment.client.headers["authorization"] = f"Bearer {KEYS[0]}"
        yield deployment


def ask(pair: Deployment, method: str, path: str, key: str = KEYS[0], **fields: Any) -> httpx.Response:
    """Over a connection of its own."""
    with httpx.Client(base_url=pair.url, timeout=60, headers={"authorization": f"Bearer {key}"}) as client:
        return client.request(method, f"/v1/responses{path}", **fields)


def one_of_each(pair: Deployment, **fields: Any) -> list[str]:
    """Ids of two responses, each made by another frontend, which the id names."""
    made: dict[str, str] = {}
    for _ in range(10 * TRIES):
        id = ask(pair, "POST", "", json={**BODY, **fields}).json()["id"]
        made.setdefault(id[5:9], id)
        if len(made) == 2:
            return [*made.values()]
    raise AssertionError("all connections came to one frontend")


def test_a_response_is_found_over_every_connection(pair: Deployment) -> None:
    for id in one_of_each(pair):
        first = ask(pair, "GET", f"/{id}").json()
        assert first["status"] == "incomplete"
        for _ in range(TRIES):
            assert ask(pair, "GET", f"/{id}").json() == first
            items = ask(pair, "GET", f"/{id}/input_items", params={"limit": 1}).json()
            assert items["data"][0]["content"][0]["text"] == BODY["input"]
            assert ask(pair, "POST", f"/{id}/cancel").json() == first


def test_a_conversation_goes_on_over_every_connection(pair: Deployment) -> None:
    for id in one_of_each(pair):
        answers = [ask(pair, "POST", "", json={**BODY, "seed": 1, "previous_response_id": id}) for _ in range(TRIES)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["id"][5:9] for answer in answers} == {id[5:9]}, "it stays where its beginning is"
        texts = {answer.json()["output"][0]["content"][0]["text"] for answer in answers}
        assert len(texts) == 1
        for _ in range(TRIES):
            streamed = ask(pair, "POST", "", json={**BODY, "seed": 1, "previous_response_id": id, "stream": True})
            assert streamed.headers["content-type"].startswith("text/event-stream")
            data = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
            assert json.loads(data[-1])["response"]["output"][0]["content"][0]["text"] in texts
        wrong = [ask(pair, "POST", "", json={"input": 5, "previous_response_id": id}) for _ in range(TRIES)]
        assert {answer.status_code for answer in wrong} == {400}


def test_a_background_response_is_followed_and_cancelled_over_every_connection(pair: Deployment) -> None:
    with openai.OpenAI(base_url=f"{pair.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        for _ in range(TRIES):
            stream: Any = client.responses.create(model=None, **_typed(ENDLESS))
            created = next(iter(stream))
            stream.close()
            id = created.response.id
            with (
                httpx.Client(base_url=pair.url, timeout=60, headers=dict(pair.client.headers)) as other,
                other.stream("GET", f"/v1/responses/{id}", params={"stream": "true"}) as followed,
            ):
                lines = (line for line in followed.iter_lines() if line.startswith("data: "))
                assert json.loads(next(lines)[6:])["response"]["id"] == id
                assert ask(pair, "POST", f"/{id}/cancel").json()["status"] == "cancelled"
                assert json.loads([*lines][-1][6:])["response"]["status"] == "cancelled"
    pair.wait_idle()


def _typed(body: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in body.items() if name != "ignore_eos"}
    return {**own, "extra_body": {"ignore_eos": True}}


def test_a_client_that_leaves_ends_what_another_frontend_does_for_it(pair: Deployment) -> None:
    for id in one_of_each(pair):
        for _ in range(TRIES // 2):
            body = {**BODY, "max_output_tokens": 1500, "stream": True, "previous_response_id": id}
            with (
                httpx.Client(base_url=pair.url, timeout=60, headers=dict(pair.client.headers)) as client,
                client.stream("POST", "/v1/responses", json=body) as response,
            ):
                assert "response.created" in next(response.iter_lines())
    pair.wait_idle()


def test_another_key_does_not_see_it(pair: Deployment) -> None:
    for id in one_of_each(pair):
        for _ in range(TRIES):
            for method, path in (("GET", f"/{id}"), ("GET", f"/{id}/input_items"), ("POST", f"/{id}/cancel")):
                assert ask(pair, method, path, KEYS[1]).status_code == 404
            assert ask(pair, "DELETE", f"/{id}", KEYS[1]).status_code == 404
            body = {**BODY, "previous_response_id": id}
            assert ask(pair, "POST", "", KEYS[1], json=body).status_code == 404
            assert ask(pair, "GET", f"/{id}", "no-key-at-all").status_code == 401
        assert ask(pair, "GET", f"/{id}").status_code == 200


def test_what_is_deleted_is_gone_over_every_connection(pair: Deployment) -> None:
    for id in one_of_each(pair):
        assert ask(pair, "DELETE", f"/{id}").json() == {"id": id, "object": "response", "deleted": True}
        assert {ask(pair, "GET", f"/{id}").status_code for _ in range(TRIES)} == {404}
    for id in ("resp_0007" + "0" * 28, "resp_x", "x" * 300):
        assert {ask(pair, "GET", f"/{id}").status_code for _ in range(TRIES)} == {404}


def test_the_latest_responses_are_kept(pair: Deployment) -> None:
    ids = [ask(pair, "POST", "", json=BODY).json()["id"] for _ in range(100)]
    owner, count = Counter(id[5:9] for id in ids).most_common(1)[0]
    assert count > 40
    mine = [id for id in ids if id[5:9] == owner]
    assert [ask(pair, "GET", f"/{id}").status_code for id in mine] == [404] * (len(mine) - 40) + [200] * 40

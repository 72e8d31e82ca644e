"""What a model says, through its server's OpenAI API: log-probabilities of a text, and greedy answers.

vLLM's extensions are used, the same in 0.26 and 0.32: `/tokenize`, `prompt_logprobs` and `return_token_ids`.
Log-probabilities of a prompt come with `/v1/completions`; one token is generated beside them and thrown away.
Requests go out from threads, so that a notebook's own event loop is left alone.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import orjson
import pandas as pd

from ..errors import BadInput, LevelFailed
from ..metrics.quality import Reading
from ..ui import StatusLine
from .endpoint import Endpoint

_TIMEOUT_S = 600
# What passes (a restarting proxy, a full queue) is asked again after so many seconds each.
_PAUSES_S = (1.0, 2.0, 4.0)
Progress = Callable[[int, int], None]


def tokenize(endpoint: Endpoint, text: str) -> tuple[list[int], list[int]]:
    """The tokens of `text`, and those that the tokenizer puts before any text. Raises BadInput without `/tokenize`."""
    with _client(endpoint, 1) as http:
        whole, bare = (
            _post(http, "/tokenize", {"model": endpoint.model, "prompt": text, "add_special_tokens": special})["tokens"]
            for special in (True, False)
        )
    return bare, whole[: max(len(whole) - len(bare), 0)]


def read_documents(
    endpoint: Endpoint,
    documents: Sequence[Sequence[int]],
    *,
    before: Sequence[int] = (),
    top: int = 20,
    in_flight: int = 64,
    progress: Progress = lambda done, of: None,
) -> Reading:
    """Has the server read `documents` (token ids, `before` put in front of each), `in_flight` at a time. The first
    token of a document has no prediction unless `before` precedes it. Raises BadInput for a server that gives no prompt
    log-probabilities, LevelFailed when a request fails."""

    def read(http: httpx.Client, index: int) -> tuple[np.ndarray, ...]:
        prompt = [*before, *documents[index]]
        body = {"model": endpoint.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        rows = _post(http, "/v1/completions", body)["choices"][0].get("prompt_logprobs")
        if not rows:
            raise BadInput(f"{endpoint.base_url} gives no prompt log-probabilities (`prompt_logprobs`, an extension of "
                           "vLLM's); quality needs them")  # fmt: skip
        first = max(len(before), 1)
        return _unpack(prompt[first:], rows[first:], top)

    parts = _each(endpoint, read, len(documents), in_flight, progress)
    document = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part[0]) for part in parts])
    return Reading(document, *(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def answer(
    endpoint: Endpoint,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    in_flight: int = 64,
    progress: Progress = lambda done, of: None,
) -> pd.DataFrame:
    """Greedy answers that end by themselves or at `max_tokens`: one row a prompt, in order. Columns: prompt (its
    number), tokens (list of ids), finish_reason (stop or length), text. A model with a chat template is asked in a
    chat, any other to go on with the prompt. Raises as `read_documents`."""
    common = {"model": endpoint.model, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
    chat = _has_chat_template(endpoint)

    def ask(http: httpx.Client, index: int) -> dict:
        if chat:
            body = common | {"messages": [{"role": "user", "content": prompts[index]}]}
            choice = _post(http, "/v1/chat/completions", body)["choices"][0]
            text = choice["message"]["content"]
        else:
            choice = _post(http, "/v1/completions", common | {"prompt": prompts[index]})["choices"][0]
            text = choice["text"]
        if choice.get("token_ids") is None:
            raise BadInput(f"{endpoint.base_url} gives no token ids (`return_token_ids`, an extension of vLLM's); "
                           "quality needs them")  # fmt: skip
        return {"tokens": choice["token_ids"], "finish_reason": choice["finish_reason"], "text": text or ""}

    table = pd.DataFrame(_each(endpoint, ask, len(prompts), in_flight, progress))
    table.insert(0, "prompt", np.arange(len(table), dtype=np.int32))
    return table


def _unpack(tokens: Sequence[int], rows: Sequence[dict], top: int) -> tuple[np.ndarray, ...]:
    """One document's columns of a `Reading`. A row maps token ids to their entries: the k likeliest and the actual."""
    logprob = np.empty(len(tokens), np.float32)
    ids, logprobs = np.empty((len(tokens), top), np.int32), np.empty((len(tokens), top), np.float32)
    for i, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        logprob[i] = row[str(token)]["logprob"]
        likeliest = sorted(row.items(), key=lambda entry: -entry[1]["logprob"])[:top]
        ids[i] = [int(id) for id, _ in likeliest]
        logprobs[i] = [entry["logprob"] for _, entry in likeliest]
    return np.asarray(tokens, np.int32), logprob, ids, logprobs


def _has_chat_template(endpoint: Endpoint) -> bool:
    """Only a refusal of the request itself (400) says that it has none: anything else might pass, and then one variant
    would be asked otherwise than the next."""
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    with _client(endpoint, 1) as http:
        response = _reply(http, "/v1/chat/completions", body)
        if response.status_code != 400:
            _checked(response)
            return True
    StatusLine().done(f"{endpoint.model}: asked to go on with each prompt, for it has no chat: {response.text[:300]}")
    return False


def _each(endpoint: Endpoint, work: Callable, count: int, in_flight: int, progress: Progress) -> list:
    """`work(http, i)` for i below `count`, `in_flight` at a time; the results in order. The first error ends it."""
    results = []
    with _client(endpoint, in_flight) as http, ThreadPoolExecutor(in_flight) as pool:
        try:
            for result in pool.map(lambda index: work(http, index), range(count)):
                results.append(result)
                progress(len(results), count)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def _client(endpoint: Endpoint, connections: int) -> httpx.Client:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    base, headers = endpoint.base_url.removesuffix("/v1"), endpoint.all_headers()
    return httpx.Client(base_url=base, headers=headers, limits=limits, timeout=_TIMEOUT_S, trust_env=False)


def _post(http: httpx.Client, path: str, body: dict) -> dict:
    return orjson.loads(_checked(_reply(http, path, body)).content)


def _reply(http: httpx.Client, path: str, body: dict) -> httpx.Response:
    """The server's reply; a broken connection, a 429 or a 5xx is tried again. Raises LevelFailed when none comes."""
    for pause in (*_PAUSES_S, None):
        try:
            response = http.post(path, content=orjson.dumps(body), headers={"Content-Type": "application/json"})
            if pause is None or not (response.status_code == 429 or response.is_server_error):
                return response
        except httpx.HTTPError as error:
            if pause is None or isinstance(error, httpx.TimeoutException):
                raise LevelFailed(f"{str(http.base_url).rstrip('/')}{path} did not answer: {error!r}") from None
        time.sleep(pause)


def _checked(response: httpx.Response) -> httpx.Response:
    """The reply of a request that was granted. Raises BadInput for an unknown path, LevelFailed for a refusal."""
    if response.status_code in (404, 405):
        raise BadInput(f"{response.url} is unknown there; quality needs vLLM's own server")
    if not response.is_success:
        raise LevelFailed(f"{response.url} refused: {response.status_code} {response.text[:300]}")
    return response

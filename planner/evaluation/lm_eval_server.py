"""Use a running vLLM server as a model of lm-eval.

lm-eval's own classes do not fit. Its class ``vllm`` needs a package named vllm, but the CPU build has another name.
``local-completions`` needs packages that nothing else here needs. This class talks to the server that users run, on any
device; vLLM batches concurrent requests.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from planner.common.progress import Progress
from planner.evaluation.vllm_server import ServerError
from planner.text.tokenizer import load_tokenizer

SECONDS = 3600
"""Timeout of one answer. A CPU may need minutes for a long prompt."""

Request = tuple[Any, list[int], list[int]]
"""(lm-eval's key for the answer, tokens of the context, tokens of the continuation)."""


class ServedModel(TemplateLM):  # type: ignore[misc]
    """A model of lm-eval that asks a server.

    Args:
        url: the server's base URL for OpenAI clients.
        folder: folder of the served model, for the tokenizer.
        concurrent: number of requests at a time.
        progress: shows the progress.
    """

    def __init__(self, url: str, folder: Path, concurrent: int, progress: Progress) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(folder)
        self._url, self._concurrent, self._progress = url, concurrent, progress
        self.max_length = int(self._call("models", None)["data"][0]["max_model_len"])

    @property
    def eot_token_id(self) -> int:
        """See :class:`lm_eval.api.model.TemplateLM`."""
        found: int = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """Token that precedes a text without context."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, the same as in lm-eval's transformers model."""
        prefix = None if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether each of its tokens is the most likely one."""
        prompts = [(context + continuation)[1 - self.max_length :] for _, context, continuation in requests]
        answers = self._ask([{"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0} for prompt in prompts])
        found = []
        for (_key, _context, continuation), answer in zip(requests, answers, strict=True):
            # prompt_logprobs of 0 gives only the prompt's own token and its rank for each position, nothing for the
            # first position.
            places = answer["prompt_logprobs"][-len(continuation) :]
            last = [next(iter(place.values())) for place in places if place]
            found.append((sum(it["logprob"] for it in last), all(it["rank"] == 1 for it in last)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return the log-likelihood of each text. Long texts are split into windows."""
        found = []
        for (string,) in (request.args for request in requests):
            parts = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length - 2, 1)
            windows = [(None, *make_disjoint_window(part)) for part in parts]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(windows)))
        return found

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return the model's continuation of each text, up to the first stop sequence."""
        bodies, stops = [], []
        for context, wanted in (request.args for request in requests):
            options = normalize_gen_kwargs(wanted)
            options.pop("do_sample", None)
            stops.append(handle_stop_sequences(options.pop("until", None), self.tokenizer.eos_token))
            count = options.pop("max_gen_toks")
            prompt = self.tok_encode(context)[-max(1, self.max_length - count) :]
            bodies.append({**options, "prompt": prompt, "max_tokens": count, "stop": stops[-1]})
        texts = [answer["text"] for answer in self._ask(bodies)]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def _ask(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the first choice of each completion. Several requests run at the same time."""
        with ThreadPoolExecutor(self._concurrent) as pool:
            shared = {"model": "model", "temperature": 0.0}
            waiting = [pool.submit(self._call, "completions", {**shared, **body}) for body in bodies]
            try:
                return [it.result()["choices"][0] for it in self._progress.track(waiting, "requests to vLLM")]
            finally:
                pool.shutdown(cancel_futures=True)

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise ServerError(f"the server refused a request: {error.read().decode(errors='replace')[:500]}") from None
        except OSError as error:
            raise ServerError(f"the server does not answer ({error})") from None
        return found

"""A running vLLM server as a model of lm-eval.

lm-eval has two ways of its own. Its class ``vllm`` asks for the version of a package of that name, which the CPU build
does not have, and ``local-completions`` needs packages that nothing else here does. This one talks to the server that
users run, on any device, and vLLM batches what is asked at the same time.
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

from planner.calibration.reading.text import load_tokenizer
from planner.common.progress import Progress
from planner.evaluation.vllm_server import ServerError

SECONDS = 3600
"""How long one answer may take: a CPU may need minutes for a long prompt."""

Request = tuple[Any, list[int], list[int]]
"""What lm-eval remembers an answer by, tokens of the context, tokens of the continuation."""


class ServedModel(TemplateLM):  # type: ignore[misc]
    """Answers from a server.

    Args:
        url: its base URL for OpenAI clients.
        folder: the model that it serves, for the tokenizer.
        concurrent: requests at a time.
        progress: says how far it is.
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
        """Return what stands before a text without context."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return tokens as lm-eval's transformers model does, so that both see the same."""
        prefix = None if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is what the model finds likeliest."""
        prompts = [(context + continuation)[1 - self.max_length :] for _, context, continuation in requests]
        answers = self._ask([{"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0} for prompt in prompts])
        found = []
        for (_key, _context, continuation), answer in zip(requests, answers, strict=True):
            # With no alternatives asked for, each place has the prompt's own token, and its rank among all; the first
            # has none.
            places = answer["prompt_logprobs"][-len(continuation) :]
            last = [next(iter(place.values())) for place in places if place]
            found.append((sum(it["logprob"] for it in last), all(it["rank"] == 1 for it in last)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return the log-likelihood of each text, read in windows."""
        found = []
        for (string,) in (request.args for request in requests):
            parts = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length - 2, 1)
            windows = [(None, *make_disjoint_window(part)) for part in parts]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(windows)))
        return found

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return what the model writes behind each text, up to the first of its stops."""
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
        """Return the first choice of each completion, several being asked for at the same time."""
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

"""Answer many prompts without a server: python offline.py DIR."""

import sys

from vllm import LLM, SamplingParams

PROMPTS = ["def main(", "import ", "class Error(", "    return "]


def main() -> None:
    """Load the checkpoint; its quantization method is detected from config.json."""
    model = LLM(sys.argv[1], max_model_len=512, enforce_eager=True)
    for answer in model.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0)):
        print(repr(answer.prompt), "→", repr(answer.outputs[0].text))


if __name__ == "__main__":  # vLLM starts processes, which import this file again
    main()

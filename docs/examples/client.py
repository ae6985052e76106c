"""Ask a served model: moeq serve DIR, then python client.py [URL]."""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1", api_key="none")
model = client.models.list().data[0].id
answer = client.completions.create(model=model, prompt="def main(", max_tokens=32, temperature=0)
print(answer.choices[0].text)

for part in client.completions.create(model=model, prompt="import ", max_tokens=16, temperature=0, stream=True):
    print(part.choices[0].text, end="", flush=True)
print()

"""Ask a served model: moeq serve DIR, and python client.py [URL], which waits until the server has started."""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
client = OpenAI(base_url=url, api_key="none", max_retries=60)  # at most eight seconds apart
model = client.models.list().data[0].id
answer = client.completions.create(model=model, prompt="def main(", max_tokens=32, temperature=0)
print(answer.choices[0].text)

for part in client.completions.create(model=model, prompt="import ", max_tokens=16, temperature=0, stream=True):
    print(part.choices[0].text, end="", flush=True)
print()

"""Ask the base and an adapter the same question: python chat.py BASE ADAPTER, while `hone serve --base BASE` runs."""

import sys

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="not needed on 127.0.0.1")
print("served:", [model.id for model in client.models.list()])
for model in sys.argv[1:]:
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "What does json.dumps do?"}], max_tokens=60, stream=True
    )
    print(f"\n{model}: ", end="")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

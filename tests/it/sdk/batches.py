"""A batch through the openai package.

Usage: batches.py BASE_URL API_KEY BASE_MODEL. Prints `done` when everything was as it should be.
"""

import json
import sys
import time

import openai

base_url, api_key, base = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)


def request(i):
    body = {"model": base, "messages": [{"role": "user", "content": f"Question {i}"}], "max_tokens": 5, "temperature": 0}
    return json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"


file = client.files.create(file=("requests.jsonl", "".join(map(request, range(5))).encode()), purpose="batch")
batch = client.batches.create(
    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"team": "tests"})
deadline = time.monotonic() + 120
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    assert time.monotonic() < deadline, batch
    time.sleep(0.05)
    batch = client.batches.retrieve(batch.id)
assert batch.status == "completed", batch
assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 5, 0), batch
assert batch.metadata == {"team": "tests"} and batch.errors is None and batch.usage.output_tokens > 0, batch
lines = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
assert [line["custom_id"] for line in lines] == [f"r{i}" for i in range(5)], lines
answer = openai.types.chat.ChatCompletion.model_validate(lines[3]["response"]["body"])
live = client.chat.completions.create(**json.loads(request(3))["body"])
assert answer.choices[0].message.content == live.choices[0].message.content, (answer, live)
assert [b.id for b in client.batches.list(limit=1)] == [batch.id]
try:
    client.batches.cancel(batch.id)
except openai.ConflictError as error:
    assert error.code == "invalid_batch_state", error
else:
    raise AssertionError("a batch that has ended was cancelled")
print("done")

"""Drives a server through the openai package: upload, job, events, checkpoints, chat, completions, errors, deletion.

Usage: drive.py BASE_URL API_KEY BASE_MODEL. Prints `done` when everything was as it should be.
"""

import io
import json
import sys
import time

import openai

base_url, api_key, base = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)


def rows(n):
    for i in range(n):
        messages = [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": f"Answer {i}"}]
        yield json.dumps({"messages": messages}) + "\n"


def refused(error, code, call):
    try:
        call()
    except error as e:
        assert e.code == code, (e.code, e.body)
        assert e.request_id, "no request id"
        return
    raise AssertionError(f"expected {error.__name__} {code}")


# Models and files.
assert [m.id for m in client.models.list()] == [base]
content = "".join(rows(8))
file = client.files.create(file=("rows.jsonl", io.BytesIO(content.encode())), purpose="fine-tune")
assert (file.object, file.status, file.bytes, file.filename) == ("file", "processed", len(content), "rows.jsonl"), file
assert client.files.retrieve(file.id).id == file.id
assert client.files.content(file.id).read().decode() == content
extra = [client.files.create(file=("v.jsonl", "".join(rows(n)).encode()), purpose="fine-tune") for n in (1, 2)]
assert {f.id for f in client.files.list(limit=1)} == {file.id, *(f.id for f in extra)}

# The same content in parts, as the package sends large files.
upload = client.uploads.upload_file_chunked(
    file=content.encode(), filename="parts.jsonl", bytes=len(content), mime_type="text/jsonl", purpose="fine-tune",
    part_size=100,
)
assert (upload.status, upload.file.bytes) == ("completed", len(content)), upload
assert client.files.content(upload.file.id).read().decode() == content
client.files.delete(upload.file.id)

# An answer that is kept.
kept = client.chat.completions.create(
    model=base, messages=[{"role": "user", "content": "Hello"}], max_tokens=3, store=True)
found = client.chat.completions.retrieve(kept.id)
assert found.choices[0].message.content == kept.choices[0].message.content, found
assert client.chat.completions.delete(kept.id).deleted

# A job, with our fields in extra_body.
job = client.fine_tuning.jobs.create(
    model=base,
    training_file=file.id,
    validation_file=extra[1].id,
    suffix="sdk",
    seed=7,
    metadata={"team": "tests"},
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
    extra_body={
        "adapter": {"type": "lora", "r": 4, "alpha": 12},
        "training": {"learning_rate": 0.01, "checkpoint_every": 1},
    },
)
assert job.status in ("queued", "running"), job
assert job.method.supervised.hyperparameters.n_epochs == 2, job
deadline = time.monotonic() + 300
while job.status not in ("succeeded", "failed", "cancelled"):
    assert time.monotonic() < deadline, job
    time.sleep(0.05)
    job = client.fine_tuning.jobs.retrieve(job.id)
assert job.status == "succeeded", job.error
assert job.fine_tuned_model.startswith(f"ft:{base}:default:sdk:"), job.fine_tuned_model
assert job.trained_tokens > 0 and job.seed == 7 and job.metadata == {"team": "tests"}
assert [j.id for j in client.fine_tuning.jobs.list(limit=1)] == [job.id]

events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
assert len({e.id for e in events}) == len(events)
metrics = [e for e in events if e.type == "metrics"]
assert [e.data["step"] for e in metrics] == [4, 3, 2, 1], [e.data for e in metrics]
assert all(e.data["total_steps"] == 4 and e.data["train_loss"] > 0 for e in metrics)

checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
assert [c.step_number for c in checkpoints] == [4, 3, 2, 1], checkpoints
assert all(c.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-{c.step_number}" for c in checkpoints)
result = client.files.content(job.result_files[0]).text
assert result.splitlines()[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", result
assert len(result.splitlines()) == 5, result

# The tuned model answers, whole and streamed, as does a checkpoint; the base beside them.
assert job.fine_tuned_model in [m.id for m in client.models.list()]
ask = dict(
    messages=[{"role": "user", "content": "Question 3"}], max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
)
whole = client.chat.completions.create(model=job.fine_tuned_model, **ask)
assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length", whole
assert whole.usage.completion_tokens == 16, whole.usage
stream = client.chat.completions.create(
    model=job.fine_tuned_model, stream=True, stream_options={"include_usage": True}, **ask
)
text, usage = "", None
for chunk in stream:
    text += "".join(choice.delta.content or "" for choice in chunk.choices)
    usage = chunk.usage or usage
assert text == whole.choices[0].message.content, (text, whole)
assert usage == whole.usage, (usage, whole.usage)
last = client.chat.completions.create(model=checkpoints[0].fine_tuned_model_checkpoint, **ask)
assert last.choices[0].message.content == text
scored = dict(model=base, **ask, logprobs=True, top_logprobs=2)
frozen = client.chat.completions.create(**scored)
tuned = client.chat.completions.create(**{**scored, "model": job.fine_tuned_model})
first = [answer.choices[0].logprobs.content[0].logprob for answer in (frozen, tuned)]
assert first[0] != first[1], "the adapter changes nothing"

# Completions, with text and with token ids.
complete = dict(model=job.fine_tuned_model, max_tokens=8, temperature=0, extra_body={"ignore_eos": True})
by_text = client.completions.create(prompt="Answer", **complete)
by_ids = client.completions.create(prompt=list(b"Answer"), **complete)
assert by_text.choices[0].text == by_ids.choices[0].text
both = client.completions.create(prompt=["Answer", "Question"], n=2, **complete)
assert [c.index for c in both.choices] == [0, 1, 2, 3]
assert both.choices[0].text == both.choices[1].text == by_text.choices[0].text
pieces = client.completions.create(prompt="Answer", stream=True, **complete)
assert "".join(c.choices[0].text for c in pieces) == by_text.choices[0].text
echo = client.completions.create(model=base, prompt="Answer", max_tokens=0, echo=True, logprobs=1)
assert echo.choices[0].text == "Answer" and len(echo.choices[0].logprobs.token_logprobs) == 6, echo

# Another job is paused, resumed and cancelled; the SDK sends no body.
long = client.fine_tuning.jobs.create(
    model=base,
    training_file=file.id,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1000}}},
)
for step, wanted in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
    getattr(client.fine_tuning.jobs, step)(long.id)
    while client.fine_tuning.jobs.retrieve(long.id).status != wanted:
        assert time.monotonic() < deadline, (step, client.fine_tuning.jobs.retrieve(long.id))
        time.sleep(0.02)
refused(openai.BadRequestError, "invalid_job_state", lambda: client.fine_tuning.jobs.cancel(long.id))

# A tuned model is continued.
more = client.fine_tuning.jobs.create(
    model=job.fine_tuned_model, training_file=file.id, extra_body={"training": {"max_steps": 1}}
)
while (more := client.fine_tuning.jobs.retrieve(more.id)).status not in ("succeeded", "failed"):
    assert time.monotonic() < deadline, more
    time.sleep(0.05)
assert more.status == "succeeded", more.error
assert more.model == job.fine_tuned_model and more.fine_tuned_model != job.fine_tuned_model

# Formats and embeddings.
made = client.chat.completions.create(model=base, **ask, response_format={"type": "json_object"})
assert made.choices[0].message.content.startswith("{"), made
vectors = client.embeddings.create(model=base, input=["a", "b"])
assert [round(sum(x * x for x in found.embedding), 3) for found in vectors.data] == [1, 1], vectors

# Errors are the SDK's own classes.
refused(openai.NotFoundError, "model_not_found", lambda: client.chat.completions.create(**{**ask, "model": "none"}))
refused(
    openai.BadRequestError,
    "unsupported_parameter",
    lambda: client.chat.completions.create(model=base, **ask, user="u"),
)
stranger = openai.OpenAI(base_url=base_url, api_key="wrong-key-of-twenty-letters", max_retries=0)
refused(openai.AuthenticationError, "invalid_api_key", lambda: stranger.models.list())

# Deletion.
assert client.models.delete(job.fine_tuned_model).deleted
refused(
    openai.NotFoundError,
    "model_not_found",
    lambda: client.chat.completions.create(model=job.fine_tuned_model, **ask),
)
assert client.files.delete(file.id).deleted
refused(openai.NotFoundError, "not_found", lambda: client.files.retrieve(file.id))
print("done")

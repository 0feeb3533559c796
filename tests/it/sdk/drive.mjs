// Drives a server through the openai package for Node: files, a job, chat whole and streamed, tools, embeddings, errors.
//
// Usage: node drive.mjs BASE_URL API_KEY BASE_MODEL, where node finds the package. Prints `done` when everything was as it
// should be.

import assert from "node:assert/strict";
import { File } from "node:buffer";
import { setTimeout } from "node:timers/promises";
import OpenAI, { toFile } from "openai";

// Before Node 20 it is no global.
globalThis.File ??= File;
const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

async function all(pages) {
  const found = [];
  for await (const one of pages) found.push(one);
  return found;
}

// Files.
const rows = Array.from({ length: 8 }, (_, i) => ({
  messages: [{ role: "user", content: `Question ${i}` }, { role: "assistant", content: `Answer ${i}` }],
}));
const content = rows.map((row) => JSON.stringify(row) + "\n").join("");
const file = await client.files.create({ file: await toFile(Buffer.from(content), "rows.jsonl"), purpose: "fine-tune" });
assert.deepEqual([file.status, file.bytes, file.filename], ["processed", content.length, "rows.jsonl"]);
assert.equal(await (await client.files.content(file.id)).text(), content);
const other = await client.files.create({ file: await toFile(Buffer.from(content), "b.jsonl"), purpose: "fine-tune" });
assert.deepEqual((await all(client.files.list({ limit: 1 }))).map((f) => f.id).sort(), [file.id, other.id].sort());

// A job, with fields of ours beside OpenAI's.
let job = await client.fineTuning.jobs.create({
  model, training_file: file.id, suffix: "node", seed: 7,
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 4 } } },
  adapter: { type: "lora", r: 4, alpha: 12 }, training: { learning_rate: 0.01, checkpoint_every: 1 },
});
for (const end = Date.now() + 300_000; !["succeeded", "failed", "cancelled"].includes(job.status); ) {
  assert(Date.now() < end, JSON.stringify(job));
  await setTimeout(50);
  job = await client.fineTuning.jobs.retrieve(job.id);
}
assert.equal(job.status, "succeeded", JSON.stringify(job.error));
const events = await all(client.fineTuning.jobs.listEvents(job.id, { limit: 3 }));
const steps = events.filter((event) => event.type === "metrics").map((event) => event.data.step);
assert.deepEqual(steps, [4, 3, 2, 1]);
const checkpoints = await all(client.fineTuning.jobs.checkpoints.list(job.id, { limit: 2 }));
assert.deepEqual(checkpoints.map((checkpoint) => checkpoint.step_number), [4, 3, 2, 1]);
const tuned = job.fine_tuned_model;
assert((await all(client.models.list())).some((one) => one.id === tuned));

// Chat, whole and streamed.
const ask = { model: tuned, messages: [{ role: "user", content: "Question 3" }], max_tokens: 16, temperature: 0, ignore_eos: true };
const whole = await client.chat.completions.create(ask);
assert.deepEqual([whole.choices[0].finish_reason, whole.usage.completion_tokens], ["length", 16]);
let text = "", usage;
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, 16);
// Broken off in the middle: the next request is served.
for await (const chunk of await client.chat.completions.create({ ...ask, max_tokens: 200, stream: true })) {
  if (chunk.choices[0].delta.content) break;
}
assert.equal((await client.chat.completions.create(ask)).choices[0].message.content, text);

// A tool: its arguments come in pieces, and the package puts them together.
const parameters = {
  type: "object", properties: { city: { enum: ["Bern", "Basel"] }, days: { enum: [1, 2, 3] } },
  required: ["city", "days"], additionalProperties: false,
};
const call = {
  model, messages: [{ role: "user", content: "Weather?" }], max_tokens: 200, seed: 5,
  tools: [{ type: "function", function: { name: "weather", strict: true, parameters } }],
  tool_choice: { type: "function", function: { name: "weather" } },
};
let pieces = 0;
const stream = client.chat.completions.stream(call).on("tool_calls.function.arguments.delta", () => pieces++);
const [streamed] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
const [called] = (await client.chat.completions.create(call)).choices[0].message.tool_calls;
assert(pieces > 3, `${pieces} pieces`);
assert.deepEqual(streamed.function.arguments, called.function.arguments);
const { city, days } = JSON.parse(called.function.arguments);
assert(["Bern", "Basel"].includes(city) && [1, 2, 3].includes(days), called.function.arguments);

// Embeddings, which the package asks for in base64, and lists of them.
const vectors = await client.embeddings.create({ model, input: ["a", "b"] });
const numbers = await client.embeddings.create({ model, input: ["a", "b"], encoding_format: "float" });
for (const [i, { embedding }] of vectors.data.entries()) {
  assert(Math.abs(embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-3);
  assert(embedding.every((x, at) => Math.abs(x - numbers.data[i].embedding[at]) < 1e-6));
}

// Errors are the package's own classes.
const refused = async (promise, kind, code) =>
  assert.rejects(promise, (error) => error instanceof kind && error.code === code && Boolean(error.requestID));
await refused(client.chat.completions.create({ ...ask, model: "none" }), OpenAI.NotFoundError, "model_not_found");
await refused(client.chat.completions.create({ ...ask, user: "u" }), OpenAI.BadRequestError, "unsupported_parameter");
const stranger = new OpenAI({ baseURL, apiKey: "wrong-key-of-twenty-letters", maxRetries: 0 });
await refused(stranger.models.list(), OpenAI.AuthenticationError, "invalid_api_key");
assert((await client.files.delete(file.id)).deleted);
await refused(client.files.retrieve(file.id), OpenAI.NotFoundError, "not_found");
console.log("done");
